//! The `freightfs` command.
fn main() {}
