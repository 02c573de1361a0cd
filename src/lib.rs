//! freightfs
pub mod catalog;
pub mod codec;
pub mod convert;
pub mod error;
pub mod extent;
pub mod format;
pub mod image;
pub mod layout;
pub mod storage;
pub mod units;
pub mod vfile;
