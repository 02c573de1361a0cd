//! Programs that wait for a store which does not answer, and are told to end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::mount::Mount;
use support::proxied::{Setup, until};
use support::proxy::Fate;
use support::s3;

/// A mount whose store answers nothing about keys with `hung` in them, until it does again.
fn hanging(name: &str) -> Option<(Setup, Arc<AtomicBool>)> {
    let hangs = Arc::new(AtomicBool::new(false));
    let decides = Arc::clone(&hangs);
    let setup = Setup::new(name, move |request| {
        let is_hit = decides.load(Ordering::SeqCst) && request.target.contains("hung");
        if is_hit { Fate::Hang } else { Fate::Forward }
    })?;
    Some((setup, hangs))
}

fn mount(setup: &Setup) -> Mount {
    setup.mount(&["-o", "timeout=3600,retries=0"])
}

fn start(program: &str, arguments: &[&Path]) -> Child {
    Command::new(program).args(arguments).spawn().unwrap()
}

/// Sends a signal to a program that waits for the store, and waits for its end.
fn end_by(setup: &Setup, signal: Signal, mut child: Child) {
    until("the program waits for the store", || setup.proxy.hanging() > 0);
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
    let mut status = None;
    until("the program ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().signal(), Some(signal as i32), "it did not end by the signal");
    assert!(setup.proxy.hanging() > 0, "the store had answered");
}

#[test]
fn who_waits_for_a_read_or_a_listing_is_ended_by_a_signal() {
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let name = format!("reads-{}", signal.as_str().to_lowercase());
        let Some((setup, hangs)) = hanging(&name) else { return };
        let first = mount(&setup);
        std::fs::create_dir(first.key("hung")).unwrap();
        std::fs::write(first.key("hung/k"), "content").unwrap();
        first.unmount();
        for (program, key) in [("cat", "hung/k"), ("ls", "hung")] {
            let mount = mount(&setup);
            // It is open before the store stops, so that it is the read that waits.
            let open = std::fs::File::open(mount.key(key)).unwrap();
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open));
            hangs.store(true, Ordering::SeqCst);
            let mut command = Command::new(program);
            command.arg(if program == "ls" { mount.key(key) } else { path.into() });
            let child = match program {
                "ls" => command.spawn().unwrap(),
                _ => Command::new(program).stdin(open).spawn().unwrap(),
            };
            end_by(&setup, signal, child);
            hangs.store(false, Ordering::SeqCst);
            mount.signal("TERM");
        }
    }
}

#[test]
fn who_waits_in_close_is_ended_by_a_signal_and_the_job_is_not() {
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let name = format!("closes-{}", signal.as_str().to_lowercase());
        let Some((setup, hangs)) = hanging(&name) else { return };
        let source = setup.world.out("source");
        std::fs::write(&source, "content").unwrap();
        let mount = mount(&setup);
        std::fs::write(mount.key("hung"), "old").unwrap();
        let child = {
            // What is looked up before answers; the upload does not.
            let open = std::fs::File::create(mount.key("hung")).unwrap();
            hangs.store(true, Ordering::SeqCst);
            let child = Command::new("cat").arg(&source).stdout(open).spawn().unwrap();
            child
        };
        end_by(&setup, signal, child);
        let states = || -> Vec<String> {
            let jobs = std::fs::read_dir(mount.path("jobs")).unwrap().flatten();
            jobs.map(|job| std::fs::read_to_string(job.path()).unwrap()).collect()
        };
        assert!(states().iter().any(|job| job.contains("\"RUNNING\"") || job.contains("\"INIT\"")));
        hangs.store(false, Ordering::SeqCst);
        setup.proxy.release();
        until("the job ends", || states().iter().all(|job| job.contains("\"SUCCESS\"")));
        assert_eq!(s3::get(&setup.endpoint, &setup.bucket, "hung"), b"content");
        mount.unmount();
    }
}
