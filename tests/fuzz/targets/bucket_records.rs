#![no_main]

freightfs_fuzz::program!("bucket_records");
