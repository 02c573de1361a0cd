//! Progress: bars on a terminal, now and then a plain line elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::terminal::{plain, say_error};
use crate::units::human_bytes;

/// How often a plain line is printed.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// A bar of bytes, of which it is known how many there are.
const SIZED: &str =
    "{msg:24!} {bar:14} {percent:>3}%  {binary_bytes:>10}  {binary_bytes_per_sec:>11}  {eta:>4}";

/// A bar of percents.
const UNSIZED: &str = "{msg:24!} {bar:14} {percent:>3}%  size not known yet  {prefix}";

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or(ProgressStyle::default_bar())
}

/// The progress of several things at once, on standard error.
pub(super) struct Board {
    bars: Option<MultiProgress>,
    lines: bool,
}

impl Board {
    /// Shows nothing when `quiet`.
    pub(super) fn new(quiet: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bars = (is_terminal && !quiet).then(MultiProgress::new);
        Self { bars, lines: !is_terminal && !quiet }
    }

    /// One more thing, with its name, of `total` bytes.
    pub(super) fn add(&self, name: &str, total: u64) -> Progress {
        if let Some(bars) = &self.bars {
            let bar = ProgressBar::new(total).with_style(style(SIZED)).with_message(plain(name));
            return Progress(Kind::Bar(bars.add(bar)));
        }
        if !self.lines {
            return Progress(Kind::Silent);
        }
        let begun = Instant::now();
        let state = State { name: name.to_owned(), total, done: 0, percent: None, begun, printed: begun };
        Progress(Kind::Lines(Mutex::new(state)))
    }

    /// Prints without disturbing the bars.
    pub(super) fn print(&self, print: impl FnOnce()) {
        match &self.bars {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }
}

/// The progress of one thing.
pub(super) struct Progress(Kind);

enum Kind {
    Silent,
    Bar(ProgressBar),
    Lines(Mutex<State>),
}

struct State {
    name: String,
    total: u64,
    done: u64,
    /// What is done and what is left, where the bytes are not known.
    percent: Option<(u8, String)>,
    begun: Instant,
    printed: Instant,
}

impl Progress {
    /// So many bytes more are done.
    pub(super) fn add(&self, bytes: u64) {
        match &self.0 {
            Kind::Silent => {}
            Kind::Bar(bar) => bar.inc(bytes),
            Kind::Lines(state) => {
                let mut state = state.lock();
                state.done += bytes;
                state.print_now_and_then();
            }
        }
    }

    /// `done` bytes of `total` are done.
    pub(super) fn set(&self, done: u64, total: u64) {
        match &self.0 {
            Kind::Silent => {}
            Kind::Bar(bar) => {
                bar.set_style(style(SIZED));
                bar.set_length(total);
                bar.set_position(done);
            }
            Kind::Lines(state) => {
                let mut state = state.lock();
                (state.done, state.total, state.percent) = (done, total, None);
                state.print_now_and_then();
            }
        }
    }

    /// So many percent are done of something whose bytes nobody can count yet, and so many seconds may be left.
    pub(super) fn set_percent(&self, percent: u8, seconds: Option<u64>) {
        let left = seconds.map(|seconds| format!("{} left", left(seconds))).unwrap_or_default();
        match &self.0 {
            Kind::Silent => {}
            Kind::Bar(bar) => {
                bar.set_style(style(UNSIZED));
                bar.set_length(100);
                bar.set_position(percent.into());
                bar.set_prefix(left);
            }
            Kind::Lines(state) => {
                let mut state = state.lock();
                state.percent = Some((percent, left));
                state.print_now_and_then();
            }
        }
    }

    /// It has ended; its bar goes away.
    pub(super) fn finish(&self) {
        if let Kind::Bar(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

impl State {
    fn print_now_and_then(&mut self) {
        if self.printed.elapsed() >= LINE_INTERVAL {
            self.printed = Instant::now();
            match &self.percent {
                Some((percent, left)) => {
                    let comma = if left.is_empty() { "" } else { ", " };
                    say_error(format_args!("{}: {percent} %{comma}{left}", self.name));
                }
                None => say_error(line(&self.name, self.done, self.total, self.begun.elapsed())),
            }
        }
    }
}

/// Seconds for people.
fn left(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h", seconds.div_ceil(3600)),
    }
}

/// `NAME: 42 %, 1.2 GiB of 2.9 GiB, 310 MiB/s, 6 s left`
fn line(name: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let speed = human_bytes(rate as u64);
    if total == 0 {
        return format!("{name}: {}, {speed}/s", human_bytes(done));
    }
    let percent = (u128::from(done) * 100 / u128::from(total)).min(100);
    let left = left((total.saturating_sub(done) as f64 / rate.max(1.0)).ceil() as u64);
    format!("{name}: {percent} %, {} of {}, {speed}/s, {left} left", human_bytes(done), human_bytes(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_tell_rate_and_time_left() {
        let second = Duration::from_secs(10);
        let mib = 1 << 20;
        assert_eq!(
            line("a", 100 * mib, 400 * mib, second),
            "a: 25 %, 100 MiB of 400 MiB, 10 MiB/s, 30 s left"
        );
        assert_eq!(
            line("a", 10 * mib, 40_000 * mib, second),
            "a: 0 %, 10 MiB of 39.06 GiB, 1 MiB/s, 12 h left"
        );
        assert_eq!(line("a", 0, 10, second), "a: 0 %, 0 B of 10 B, 0 B/s, 10 s left");
        assert_eq!(line("a", 10 * mib, 0, second), "a: 10 MiB, 1 MiB/s");
    }
}
