//! The fuzz targets, for as many inputs as the tests have time for: the same ones every time. ./scripts/fuzz goes on.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "fuzz/harness.rs"]
mod harness;

use std::panic::{AssertUnwindSafe, catch_unwind};

use harness::random::Random;
use harness::{TARGETS, Target, target};

/// Changes, one over the other, that an input is away from its seed at most.
const CHANGES: u64 = 6;

/// Runs a target with its seeds and with so many changes of them. When nothing is accepted, or everything, the test tests
/// nothing.
fn fuzz(name: &str, cases: usize) {
    let target = target(name);
    let seeds = (target.seeds)();
    let refused = seeds.iter().filter(|seed| !run(target, seed)).count();
    assert!(refused <= seeds.len() / 2, "{name}: {refused} of {} seeds are refused", seeds.len());
    let mut random = Random(name.len() as u64);
    let mut accepted = 0;
    for case in 0..cases {
        let mut input = seeds[case % seeds.len()].clone();
        for _ in 0..1 + random.below(CHANGES) {
            input = target.mutate(&input, &mut random);
        }
        accepted += usize::from(run(target, &input));
    }
    println!("{name}: {accepted} of {cases} inputs were accepted");
    assert!(accepted > 0 && accepted < cases, "{name}: {accepted} of {cases} inputs were accepted");
}

/// Runs a target; what it finds is told with its input.
fn run(target: &Target, input: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| (target.run)(input))).unwrap_or_else(|found| {
        println!("the target {} found something by this input:\n{}", target.name, hex::encode(input));
        std::panic::resume_unwind(found)
    })
}

/// A test for each target, with so many changed inputs.
macro_rules! targets {
    ($($name:ident: $cases:literal,)*) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name), $cases);
            }
        )*

        #[test]
        fn every_target_is_run_here_and_by_cargo_fuzz() {
            let all: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(all, [$(stringify!($name)),*]);
            let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
            let manifest = std::fs::read_to_string(directory.join("Cargo.toml")).unwrap();
            for name in &all {
                assert!(manifest.contains(&format!("name = \"{name}\"")), "cargo-fuzz does not know {name}");
                let program = std::fs::read_to_string(directory.join(format!("targets/{name}.rs"))).unwrap();
                assert!(program.contains(&format!("\"{name}\"")));
            }
            assert_eq!(manifest.matches("[[bin]]").count(), all.len());
        }
    };
}

targets! {
    qcow2: 1600,
    vmdk: 1200,
    vhd: 1200,
    vhdx: 300,
    vdi: 800,
    zvhd: 300,
    raw: 400,
    chain: 1600,
    descriptor: 1200,
    sidecar: 1500,
    policy: 800,
    configuration: 1500,
    status: 3000,
    journal: 2000,
    upload_log: 1000,
    bucket_records: 3000,
    lengths: 3000,
    answers: 3000,
    names: 3000,
}

/// ./scripts/fuzz takes its first inputs from here.
#[test]
fn seeds_are_written() {
    let kept = tempfile::tempdir().unwrap();
    let corpus = std::env::var_os("FREIGHTFS_FUZZ_CORPUS").map_or(kept.path().to_owned(), Into::into);
    for target in TARGETS {
        let directory = corpus.join(target.name);
        std::fs::create_dir_all(&directory).unwrap();
        for (number, seed) in (target.seeds)().iter().enumerate() {
            assert!(seed.len() < 64 << 10, "the seed {number} of {} has {} bytes", target.name, seed.len());
            std::fs::write(directory.join(format!("seed-{number}")), seed).unwrap();
        }
    }
}
