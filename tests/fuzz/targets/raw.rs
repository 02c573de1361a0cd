#![no_main]

freightfs_fuzz::program!("raw");
