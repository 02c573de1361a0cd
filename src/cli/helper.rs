//! `mount.freightfs`: the program as mount(8)'s helper, so that `mount -t freightfs` and fstab work.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use super::terminal::{say, say_error};
use super::{MountArguments, OptionFlags, complain, mount};
use crate::settings::MountSettings;

/// Exit codes of mount(8), which it passes on ("EXIT STATUS").
const USAGE: u8 = 1;
const MOUNT_FAILED: u8 = 32;

/// How mount(8) calls a helper ("EXTERNAL HELPERS").
#[derive(Debug, Parser)]
#[command(name = "mount.freightfs", version, about = "Mount a catalog of images, for mount(8)")]
struct HelperArguments {
    /// Directory with image files, or a configuration file that ends in .toml
    catalog: PathBuf,
    /// Directory to mount on
    mountpoint: PathBuf,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTION,…")]
    options: Vec<String>,
    /// Take mount options that are not known, without effect
    #[arg(short = 's')]
    sloppy: bool,
    /// Check everything that can be checked without mounting, and do not mount
    #[arg(short = 'f')]
    fake: bool,
    /// Taken and without effect: there is no /etc/mtab to be written
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Say what is mounted
    #[arg(short = 'v')]
    verbose: bool,
    /// Type of the filesystem, as mount(8) passes it: freightfs, perhaps with more behind a dot
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
    /// Namespace, as mount(8) passes it: not supported
    #[arg(short = 'N', value_name = "NAMESPACE", hide = true)]
    namespace: Option<PathBuf>,
}

/// Whether the program was called by the helper's name.
pub(super) fn is_called(program: &OsString) -> bool {
    let name = std::path::Path::new(program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    name == "mount.freightfs" || name == "mount.fuse.freightfs"
}

/// The definition of its arguments.
pub(super) fn command() -> clap::Command {
    HelperArguments::command()
}

pub(super) fn run(words: &[OsString]) -> ExitCode {
    let arguments = match HelperArguments::try_parse_from(words) {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    if arguments.namespace.is_some() {
        say_error("mount.freightfs: mounting in another namespace (-N) is not supported");
        return ExitCode::from(USAGE);
    }
    let mut options = arguments.options;
    if arguments.sloppy {
        options = options.iter().map(|options| MountSettings::known_options(options)).collect();
    }
    let place = format!("{} on {}", arguments.catalog.display(), arguments.mountpoint.display());
    let mount = MountArguments {
        catalog: arguments.catalog,
        mountpoint: arguments.mountpoint,
        flags: OptionFlags::default(),
        options,
        foreground: false,
        report_ready: false,
    };
    let done = if arguments.fake { mount::check(&mount) } else { mount::run(&mount) };
    match done {
        Ok(0) => {
            if arguments.verbose {
                say(format_args!("mount.freightfs: {place}"));
            }
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::from(MOUNT_FAILED),
        Err(error) => {
            complain(&error);
            ExitCode::from(MOUNT_FAILED)
        }
    }
}
