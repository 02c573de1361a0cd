//! The `freightfs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    freightfs::cli::run()
}
