//! Counts what walks look at, in builds with debug assertions only, so that tests can bound it: entries of tables, bits
//! of bitmaps, sectors of logs.

use std::cell::Cell;

thread_local! {
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

/// Steps of this thread so far; 0 in a build without debug assertions.
pub fn taken() -> u64 {
    TAKEN.get()
}

pub(super) fn count(steps: u64) {
    if cfg!(debug_assertions) {
        TAKEN.set(TAKEN.get().saturating_add(steps));
    }
}
