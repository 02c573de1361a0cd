//! Programs that wait for a store which does not answer, and are told to end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use support::command;
use support::mount::Mount;
use support::proxied::{Setup, until};
use support::proxy::Fate;
use support::s3;

const SIGNALS: [(&str, i32); 2] = [("INT", libc::SIGINT), ("KILL", libc::SIGKILL)];

/// A mount whose store answers no such requests about keys with `hung` in them while the switch is on.
fn hanging(name: &str, method: &'static str) -> Option<(Setup, Arc<AtomicBool>)> {
    let switch = Arc::<AtomicBool>::default();
    let is_on = Arc::clone(&switch);
    let setup = Setup::new(name, move |request| {
        let hangs = is_on.load(Ordering::SeqCst) && request.method == method;
        if hangs && request.target.contains("hung") { Fate::Hang } else { Fate::Forward }
    })?;
    Some((setup, switch))
}

fn mount(setup: &Setup) -> Mount {
    setup.mount(&["-o", "timeout=3600,retries=0"])
}

/// Sends a signal to a program that waits for the store, and waits for its end.
fn end_by(setup: &Setup, (signal, number): (&str, i32), mut child: Child) {
    until("the program waits for the store", || setup.proxy.hanging() > 0);
    support::succeed(command("kill").args([&format!("-{signal}"), &child.id().to_string()]));
    let mut status = None;
    until("the program ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().signal(), Some(number), "it did not end by the signal");
    assert!(setup.proxy.hanging() > 0, "the store had answered");
}

#[test]
fn who_waits_for_a_read_or_a_listing_is_ended_by_a_signal() {
    for signal in SIGNALS {
        let Some((setup, switch)) = hanging(&format!("reads-{}", signal.1), "GET") else { return };
        let first = mount(&setup);
        std::fs::create_dir(first.key("hung")).unwrap();
        std::fs::write(first.key("hung/k"), "content").unwrap();
        first.unmount();
        let mount = mount(&setup);
        let open = File::open(mount.key("hung/k")).unwrap();
        // A directory that is entered is not looked up again.
        let mut lists = Command::new("sh");
        lists.args(["-c", "cd \"$0\" && echo there && read line && exec ls"]).arg(mount.key("hung"));
        let mut lists = lists.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut there = String::new();
        BufReader::new(lists.stdout.as_mut().unwrap()).read_line(&mut there).unwrap();
        switch.store(true, Ordering::SeqCst);
        lists.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        end_by(&setup, signal, lists);
        end_by(&setup, signal, Command::new("cat").stdin(open).spawn().unwrap());
        mount.signal("TERM");
    }
}

#[test]
fn who_waits_in_close_is_ended_by_a_signal_and_the_job_is_not() {
    for signal in SIGNALS {
        let Some((setup, switch)) = hanging(&format!("closes-{}", signal.1), "PUT") else { return };
        let mount = mount(&setup);
        switch.store(true, Ordering::SeqCst);
        let mut writes = Command::new("sh");
        writes.args(["-c", "exec echo content > \"$0\""]).arg(mount.key("hung"));
        end_by(&setup, signal, writes.spawn().unwrap());
        let states = || -> Vec<String> {
            let jobs = std::fs::read_dir(mount.path("jobs")).unwrap().flatten();
            jobs.map(|job| std::fs::read_to_string(job.path()).unwrap()).collect()
        };
        assert!(states().iter().any(|job| job.contains("\"RUNNING\"") || job.contains("\"INIT\"")));
        switch.store(false, Ordering::SeqCst);
        setup.proxy.release();
        until("the job ends", || states().iter().all(|job| job.contains("\"SUCCESS\"")));
        assert_eq!(s3::get(&setup.endpoint, &setup.bucket, "hung"), b"content\n");
        mount.unmount();
    }
}
