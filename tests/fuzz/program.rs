//! What the programs of cargo-fuzz are made of: the harness, and an allocator that counts.

#[path = "harness.rs"]
pub mod harness;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

#[doc(hidden)]
pub use libfuzzer_sys;

use harness::random::Random;
use harness::target;

/// Bytes that an input may take at once.
const MEMORY: usize = 128 << 20;

static TAKEN: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// Counts what is taken.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: the system's allocator does the work, with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let taken = TAKEN.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(taken, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Runs a target with an input; fails when that takes too much memory.
pub fn run(name: &str, input: &[u8]) {
    let before = TAKEN.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    (target(name).run)(input);
    let most = MOST.load(Ordering::Relaxed).saturating_sub(before);
    assert!(most <= MEMORY, "an input of {} bytes takes {most} bytes of memory", input.len());
}

/// Every second change is one that knows what the input is.
pub fn mutate(name: &str, data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let mut random = Random(seed.into());
    if random.below(2) == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, size, most);
    }
    let input = target(name).mutate(&data[..size], &mut random);
    let length = input.len().min(most);
    data[..length].copy_from_slice(&input[..length]);
    length
}

/// The program of a target.
#[macro_export]
macro_rules! program {
    ($name:literal) => {
        use freightfs_fuzz::libfuzzer_sys;

        libfuzzer_sys::fuzz_target!(|input: &[u8]| freightfs_fuzz::run($name, input));
        libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            freightfs_fuzz::mutate($name, data, size, max_size, seed)
        });
    };
}
