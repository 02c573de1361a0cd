//! What of a file the store has already, in the object that is replaced or as zeros, and which parts follow from it.
//!
//! [`Chunker`] cuts the file where its content says so, [`ChunkIndex`] knows where the chunks of the old object are, and
//! [`Planner`] makes parts of both. All three are functions of the bytes that they are given: no store, no clock.

pub(in crate::export) mod chunker;
mod crc64;
mod gear;
pub(in crate::export) mod index;
pub(in crate::export) mod plan;

pub(in crate::export) use chunker::{ChunkSizes, Chunker, Cut};
pub(in crate::export) use index::{ChunkIndex, ChunkList, MAX_INDEX};
pub(in crate::export) use plan::{Making, Origin, PlanLimits, PlannedPart, Planner};
