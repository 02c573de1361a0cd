//! The command line: arguments, wiring, and what people see.

mod check;
mod convert;
mod daemon;
mod document;
mod helper;
mod info;
mod jobs;
mod log;
mod mount;
mod mount_table;
mod mounter;
mod mountpoint;
mod progress;
mod sandbox;
mod silence;
mod source;
mod terminal;
mod wait;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::Error;
use crate::format::ImageFormat;
use crate::settings::{MountOption, OPTIONS};
use crate::units::parse_bytes;

/// Exit code when everything succeeded.
const OK: u8 = 0;
/// Exit code of a failure. Wrong usage exits with 2, as clap does.
const FAILED: u8 = 1;

/// A filesystem that shows virtual machine images in every disk format, and turns a copy into an export job.
#[derive(Debug, Parser)]
#[command(name = "freightfs", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount a catalog of images
    Mount(Box<MountArguments>),
    /// Convert an image file into another format
    Convert(ConvertArguments),
    /// Say what an image file is
    Info(InfoArguments),
    /// Wait until the exports of files have ended
    Wait(WaitArguments),
    /// Say how far exports are, or how they ended
    Status(StatusArguments),
    /// List the exports of mounts
    Jobs(JobsArguments),
    /// Cancel the exports of files
    Cancel(CancelArguments),
    /// Say whether images of a mount may be exported, in which formats, and why not
    Check(CheckArguments),
    /// Print completions for a shell
    Completions(CompletionsArguments),
}

/// Arguments of `freightfs completions`.
#[derive(Debug, Args)]
struct CompletionsArguments {
    /// The shell
    shell: clap_complete::Shell,
}

/// Arguments of `freightfs status`.
#[derive(Debug, Args)]
struct StatusArguments {
    /// Objects in a mount, or status files; all jobs of all mounts when there are none
    files: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `freightfs jobs`.
#[derive(Debug, Args)]
struct JobsArguments {
    /// A mount, or anything in it; all mounts when it is not given
    mountpoint: Option<PathBuf>,
    /// List those that have ended too
    #[arg(long, short)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `freightfs cancel`.
#[derive(Debug, Args)]
struct CancelArguments {
    /// Objects in a mount that are being exported
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// Arguments of `freightfs check`.
#[derive(Debug, Args)]
struct CheckArguments {
    /// Directories of images in a mount, or files in them
    #[arg(required = true)]
    paths: Vec<PathBuf>,
}

/// Arguments of `freightfs mount`.
#[derive(Debug, Args)]
struct MountArguments {
    /// Directory or bucket (a URL) with image files, or a configuration file that ends in .toml
    catalog: PathBuf,
    /// Directory to mount on
    mountpoint: PathBuf,
    #[command(flatten)]
    flags: OptionFlags,
    /// Mount options, separated by commas: the same words as the flags, and what mount(8) passes
    #[arg(short = 'o', value_name = "OPTION,…")]
    options: Vec<String>,
    /// Stay in the foreground and log to the terminal
    #[arg(long)]
    foreground: bool,
    /// Set by freightfs itself on the process that becomes the daemon
    #[arg(long, hide = true)]
    report_ready: bool,
}

/// The mount's options as flags, in the order of [`OPTIONS`].
#[derive(Debug, Default)]
struct OptionFlags(Vec<(&'static MountOption, Option<String>)>);

impl OptionFlags {
    /// The flags as they are written on a command line.
    fn words(&self) -> Vec<String> {
        let flag = |(option, value): &(&MountOption, Option<String>)| {
            let flag = format!("--{}", option.flag());
            value.as_ref().map_or(flag.clone(), |value| format!("{flag}={value}"))
        };
        self.0.iter().map(flag).collect()
    }
}

impl Args for OptionFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        OPTIONS.iter().fold(command, |command, option| {
            let argument =
                Arg::new(option.word).long(option.flag()).help(option.summary).long_help(option.text());
            command.arg(match option.value {
                Some(value) if option.is_repeated => argument.value_name(value).action(ArgAction::Append),
                Some(value) => argument.value_name(value),
                None => argument.action(ArgAction::SetTrue),
            })
        })
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for OptionFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Vec::new();
        for option in &OPTIONS {
            if option.value.is_some() {
                let values = matches.get_many::<String>(option.word).into_iter().flatten();
                flags.extend(values.map(|value| (option, Some(value.clone()))));
            } else if matches.get_flag(option.word) {
                flags.push((option, None));
            }
        }
        Ok(Self(flags))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Arguments of `freightfs convert`.
#[derive(Debug, Args)]
struct ConvertArguments {
    /// Image file, or an object's URL
    input: PathBuf,
    /// File to write, whose suffix chooses the format; - for standard output
    output: PathBuf,
    /// Format of the output, when its suffix does not tell it
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    #[command(flatten)]
    source: SourceArguments,
    /// Compression level: 1 to 9 for zlib.qcow2 and zvhd, 1 to 12 for stream.vmdk, 1 to 19 for zstd
    #[arg(long, value_name = "LEVEL")]
    level: Option<u8>,
    /// Bytes of a qcow2 cluster, as 65536 or 64K
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    cluster_size: Option<u64>,
    /// Compress qcow2's zlib clusters with a window of 32 KiB: 6 % smaller, and some readers fail
    #[arg(long)]
    large_window: bool,
    /// Threads; as many as cores by default
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Show no progress
    #[arg(long, short)]
    quiet: bool,
}

/// Arguments of `freightfs info`.
#[derive(Debug, Args)]
struct InfoArguments {
    /// Image file, or an object's URL
    image: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    source: SourceArguments,
}

/// How an image file on the command line is read.
#[derive(Debug, Args)]
struct SourceArguments {
    /// Format of the input, when its extension does not tell it: raw, qcow2, vhd, vhdx, vmdk, vdi,
    /// zvhd or zvhd2
    #[arg(long, value_name = "FORMAT", value_parser = parse_image_format)]
    input_format: Option<ImageFormat>,
    /// A file that the image may use: backing file, data file, extent or parent; may be repeated
    #[arg(long = "allow-reference", value_name = "FILE")]
    allowed: Vec<PathBuf>,
}

/// Arguments of `freightfs wait`.
#[derive(Debug, Args)]
struct WaitArguments {
    /// Objects in a mount, or their status files
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Give up after so many seconds; the exports go on
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Show no progress
    #[arg(long, short)]
    quiet: bool,
}

fn parse_image_format(name: &str) -> Result<ImageFormat, String> {
    ImageFormat::from_name(name)
        .ok_or_else(|| "known formats: raw, qcow2, vhd, vhdx, vmdk, vdi, zvhd, zvhd2".to_owned())
}

/// The definition of the program's arguments, for the manual and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// That of mount(8)'s helper.
pub fn helper_command() -> clap::Command {
    helper::command()
}

/// Runs the program with the process's arguments; called as `mount.freightfs`, it is mount(8)'s helper.
pub fn run() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    if words.first().is_some_and(helper::is_called) {
        return helper::run(&words);
    }
    if words.first().is_some_and(|program| mounter::is_called(program)) {
        return mounter::run(&words);
    }
    let result = match Arguments::parse_from(words).command {
        Command::Mount(arguments) => mount::run(&arguments),
        Command::Convert(arguments) => convert::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
        Command::Wait(arguments) => wait::run(&arguments),
        Command::Status(arguments) => jobs::status(&arguments),
        Command::Jobs(arguments) => jobs::jobs(&arguments),
        Command::Cancel(arguments) => jobs::cancel(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Completions(arguments) => {
            clap_complete::generate(arguments.shell, &mut command(), "freightfs", &mut std::io::stdout());
            Ok(OK)
        }
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error);
            ExitCode::from(FAILED)
        }
    }
}

/// One line for people on standard error.
fn complain(error: &Error) {
    terminal::say_error(format_args!("freightfs: {}", error.report()));
}

/// Threads that use all cores.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
