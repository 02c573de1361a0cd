//! The process that mounts and unmounts for the daemon, which has given up what that needs.
//!
//! It is this program again, started before the daemon restricts itself: root, or a user with the setuid program
//! fusermount3. It waits at its end of a socket for one of three words about one mount point, answers with a line, and ends
//! with the daemon. Whoever takes the daemon over can ask it to mount and unmount that, and for nothing else.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Uid};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::error::{Error, ErrorKind, Result};

/// The name by which the program is started for this.
const NAME: &str = "freightfs-mounter";

/// The kernel's device (fuse(4)).
const DEVICE: &str = "/dev/fuse";

/// The setuid program that mounts for users.
const FUSERMOUNT: &str = "fusermount3";

/// What the process is asked for.
const MOUNT: u8 = b'm';
const UNMOUNT: u8 = b'u';
const DETACH: u8 = b'd';

/// How its answers begin: done, or failed with an errno and words.
const DONE: &str = "+";

/// What to mount.
pub(super) struct MountRequest {
    pub(super) mountpoint: PathBuf,
    /// What /proc/mounts names as the source.
    pub(super) source: String,
    /// Whether other users may enter the mount.
    pub(super) allow_other: bool,
    /// Whether the kernel refuses every change.
    pub(super) read_only: bool,
    /// Who may enter it, and unmount it by fusermount3: the daemon's user.
    pub(super) owner: (Uid, Gid),
}

/// The daemon's end.
pub(super) struct Mounter {
    socket: UnixStream,
    mountpoint: PathBuf,
    device: OwnedFd,
    _process: Child,
}

impl Mounter {
    /// Starts the process.
    pub(super) fn start(request: &MountRequest) -> Result<Self> {
        let place = request.mountpoint.display().to_string();
        let device = File::options().read(true).write(true).open(DEVICE);
        let device = OwnedFd::from(device.map_err(|e| mount_error(e).in_file(&place))?);
        let failed = |e| Error::from_io("cannot start the process that mounts", e);
        let (socket, end) = UnixStream::pair().map_err(failed)?;
        let mut process = Command::new(std::env::current_exe().map_err(failed)?);
        process.arg0(NAME).arg(&request.mountpoint).arg(request.source.replace(',', "_"));
        process.arg(request.owner.0.to_string()).arg(request.owner.1.to_string());
        process.args(request.allow_other.then_some("allow_other")).args(request.read_only.then_some("ro"));
        // Not in the process group that a terminal's signals reach, and without the daemon's outputs.
        process.process_group(0).current_dir("/").stdin(OwnedFd::from(end)).stderr(Stdio::null());
        process.stdout(device.try_clone().map_err(failed)?);
        let process = process.spawn().map_err(failed)?;
        Ok(Self { socket, mountpoint: request.mountpoint.clone(), device, _process: process })
    }

    /// Mounts; returns the connection to the kernel.
    pub(super) fn mount(&mut self) -> Result<OwnedFd> {
        let received = self.ask(MOUNT).and_then(|device| {
            // fusermount3 opens the device itself.
            if let Some(device) = device {
                self.device = device;
            }
            self.device.try_clone()
        });
        received.map_err(|e| mount_error(e).in_file(self.mountpoint.display().to_string()))
    }

    /// Unmounts, unless somebody else did: another mount may be there by now.
    pub(super) fn unmount(&mut self) -> Result<()> {
        if self.is_mounted() {
            self.ask(UNMOUNT).map_err(|e| Error::from_io("cannot unmount", e))?;
        }
        Ok(())
    }

    /// Takes a busy mount out of the tree.
    pub(super) fn detach(&mut self) {
        if self.is_mounted() {
            let _ = self.ask(DETACH);
        }
    }

    /// The kernel marks the connection of a mount that is gone.
    fn is_mounted(&self) -> bool {
        let mut polled = [PollFd::new(self.device.as_fd(), PollFlags::empty())];
        let ready = poll(&mut polled, PollTimeout::ZERO);
        ready != Ok(1) || !polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
    }

    /// Asks for something; returns the descriptor that came with the answer.
    fn ask(&mut self, what: u8) -> io::Result<Option<OwnedFd>> {
        self.socket.write_all(&[what])?;
        let (mut answer, mut device) = (Vec::new(), None);
        while !answer.ends_with(b"\n") {
            let mut bytes = [0; 512];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffer = [IoSliceMut::new(&mut bytes)];
            let received = recvmsg(&self.socket, &mut buffer, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    device = descriptors.last().or(device);
                }
            }
            if received.bytes == 0 {
                return Err(io::Error::other("the process that mounts has ended"));
            }
            answer.extend_from_slice(&bytes[..received.bytes]);
        }
        // What fusermount3 sends besides the descriptor is a zero byte.
        let answer = String::from_utf8_lossy(&answer).trim_matches(['\0', '\n']).to_owned();
        match answer.split_once(' ') {
            _ if answer == DONE => Ok(device),
            Some((number, "")) => Err(io::Error::from_raw_os_error(number.parse().unwrap_or(libc::EIO))),
            Some((_, words)) => Err(io::Error::other(words.to_owned())),
            None => Err(io::Error::other(answer)),
        }
    }
}

/// Says what to do about the usual reasons.
fn mount_error(error: io::Error) -> Error {
    let text = error.to_string();
    let what = match error.kind() {
        io::ErrorKind::NotFound if !Path::new(DEVICE).exists() => {
            "cannot mount: /dev/fuse is missing; load the kernel module with `modprobe fuse`"
        }
        io::ErrorKind::NotFound => "cannot mount: fusermount3 is missing; install the package fuse3",
        io::ErrorKind::NotConnected => {
            "cannot mount: an earlier mount here died; remove it with `fusermount3 -u` or `umount -l`"
        }
        io::ErrorKind::PermissionDenied if File::open(DEVICE).is_err() => {
            "cannot mount: this user may not open /dev/fuse; its mode is usually 0666"
        }
        _ if text.contains("user_allow_other") => {
            "cannot mount: allow_other needs the line user_allow_other in /etc/fuse.conf"
        }
        _ => "cannot mount",
    };
    Error::from_io(what, error)
}

/// Whether the program was started for this.
pub(super) fn is_called(program: &OsStr) -> bool {
    program == NAME
}

/// The process: serves its standard input until the daemon has ended. Its standard output is the device.
pub(super) fn run(words: &[OsString]) -> ExitCode {
    // It ends after the daemon, which may have to unmount: not by the signals that end that.
    let signals: SigSet =
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
    let served = signals.thread_block().map_err(io::Error::from).and_then(|()| {
        let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let mut word = [0];
        while socket.read(&mut word)? == 1 {
            let done = Task::parse(words).and_then(|task| task.perform(word[0]));
            let answer = match done {
                Ok(()) => format!("{DONE}\n"),
                Err(error) => match error.raw_os_error() {
                    Some(number) => format!("{number} \n"),
                    None => {
                        format!("0 {}\n", error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
                    }
                },
            };
            socket.write_all(answer.as_bytes())?;
        }
        Ok(())
    });
    if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the process may do.
struct Task<'a> {
    mountpoint: &'a Path,
    source: &'a str,
    owner: (&'a str, &'a str),
    options: Vec<&'a str>,
}

impl<'a> Task<'a> {
    fn parse(words: &'a [OsString]) -> io::Result<Self> {
        let missing = || io::Error::from_raw_os_error(libc::EINVAL);
        let mountpoint = Path::new(words.get(1).ok_or_else(missing)?);
        let texts: Vec<&str> = words.iter().skip(2).filter_map(|word| word.to_str()).collect();
        let [source, uid, gid, options @ ..] = &texts[..] else { return Err(missing()) };
        Ok(Self { mountpoint, source, owner: (uid, gid), options: options.to_vec() })
    }

    fn perform(&self, what: u8) -> io::Result<()> {
        let is_root = nix::unistd::geteuid().is_root();
        match what {
            MOUNT if is_root => self.mount_as_root(),
            MOUNT => self.mount_as_user(),
            UNMOUNT if is_root => Ok(umount2(self.mountpoint, MntFlags::empty())?),
            DETACH if is_root => Ok(umount2(self.mountpoint, MntFlags::MNT_DETACH)?),
            UNMOUNT => self.fusermount(&["-u"]),
            DETACH => self.fusermount(&["-u", "-z"]),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    /// mount(2) with the descriptor that is the standard output.
    fn mount_as_root(&self) -> io::Result<()> {
        let (uid, gid) = self.owner;
        let directory = libc::S_IFDIR;
        let mut data = format!(
            "fd=1,rootmode={directory:o},user_id={uid},group_id={gid},default_permissions,subtype=freightfs"
        );
        // Modes and owners of objects come from the bucket: nobody there shall make a root shell here.
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        for option in &self.options {
            match *option {
                "ro" => flags |= MsFlags::MS_RDONLY,
                option => data = format!("{data},{option}"),
            }
        }
        mount(Some(self.source), self.mountpoint, Some("fuse"), flags, Some(data.as_str()))?;
        // The daemon's is the only one: the kernel ends the connection with it.
        nix::unistd::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
        Ok(())
    }

    /// fusermount3 sends the daemon its descriptor through the socket (fusermount3(1), _FUSE_COMMFD).
    fn mount_as_user(&self) -> io::Result<()> {
        nix::unistd::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
        let fixed = ["subtype=freightfs", "default_permissions", "nosuid", "nodev", "noatime"];
        let options = [&fixed[..], &self.options[..]].concat().join(",");
        self.fusermount(&["-o", &format!("fsname={},{options}", self.source)])
    }

    fn fusermount(&self, arguments: &[&str]) -> io::Result<()> {
        let mut command = Command::new(FUSERMOUNT);
        command.args(arguments).arg("--").arg(self.mountpoint).env("_FUSE_COMMFD", "0");
        let output = command.stdin(io::stdin().as_fd().try_clone_to_owned()?).output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if output.status.success() { Ok(()) } else { Err(io::Error::other(said)) }
    }
}

/// The error of a session that could not begin, after which the mount is taken away again.
pub(super) fn session_error(error: Error, mounter: &mut Mounter) -> Error {
    mounter.detach();
    Error::new(ErrorKind::Io, "cannot mount").because(error)
}
