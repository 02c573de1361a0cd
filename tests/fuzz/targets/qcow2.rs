#![no_main]

freightfs_fuzz::program!("qcow2");
