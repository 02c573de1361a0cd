#![no_main]

freightfs_fuzz::program!("upload_log");
