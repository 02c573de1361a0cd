//! The fuzz targets: what they do with an input, what they begin with, and how inputs are changed. Shared by the programs
//! that cargo-fuzz builds (`targets/`) and by the bounded run among the tests (`tests/fuzz.rs`).
//!
//! A target panics when a promise is broken: see [`images`] and [`records`]. Memory is measured by cargo-fuzz's programs
//! only, whose allocator counts.
#![allow(dead_code, unreachable_pub, reason = "the programs and the test use other parts")]

pub mod documents;
pub mod images;
pub mod packed;
#[path = "../support/random.rs"]
pub mod random;
#[path = "../support/reasons.rs"]
pub mod reasons;
pub mod records;
pub mod seal;
pub mod seeds;
#[path = "../support/sparse.rs"]
pub mod sparse;

use freightfs::format::ImageFormat;

use packed::PackedImage;
use random::Random;

/// What is fuzzed.
pub struct Target {
    pub name: &'static str,
    /// Uses an input; returns whether it was accepted. Panics when it finds something.
    pub run: fn(&[u8]) -> bool,
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    shape: Shape,
}

/// What inputs are.
#[derive(Clone, Copy)]
enum Shape {
    /// A [`PackedImage`].
    Image,
    /// Several of them.
    Chain,
    Text,
}

impl Target {
    const fn new(
        name: &'static str,
        run: fn(&[u8]) -> bool,
        seeds: fn() -> Vec<Vec<u8>>,
        shape: Shape,
    ) -> Self {
        Self { name, run, seeds, shape }
    }

    /// An input that is a change of another one.
    pub fn mutate(&self, input: &[u8], random: &mut Random) -> Vec<u8> {
        match self.shape {
            Shape::Image => {
                let mut image = PackedImage::unpack(input);
                image.mutate(random);
                image.pack()
            }
            Shape::Chain => {
                let mut files = images::unpack_chain(input);
                if !files.is_empty() {
                    let one = random.below(files.len() as u64) as usize;
                    let other = random.below(files.len() as u64) as usize;
                    match random.below(10) {
                        0 => files.swap(one, other),
                        1 => files.push(files[one].clone()),
                        2 => files[one].0 = files[other].0,
                        _ => files[one].1.mutate(random),
                    }
                }
                images::pack_chain(&files)
            }
            Shape::Text => {
                let mut text = input.to_vec();
                documents::mutate(&mut text, random);
                text
            }
        }
    }
}

/// All targets, the readers first.
pub const TARGETS: &[Target] = &[
    Target::new("qcow2", |input| images::image(ImageFormat::Qcow2, input), seeds::qcow2_images, Shape::Image),
    Target::new("vmdk", |input| images::image(ImageFormat::Vmdk, input), seeds::vmdk_images, Shape::Image),
    Target::new("vhd", |input| images::image(ImageFormat::Vhd, input), seeds::vhd_images, Shape::Image),
    Target::new("vhdx", |input| images::image(ImageFormat::Vhdx, input), seeds::vhdx_images, Shape::Image),
    Target::new("vdi", |input| images::image(ImageFormat::Vdi, input), seeds::vdi_images, Shape::Image),
    Target::new("zvhd", |input| images::image(ImageFormat::Zvhd, input), seeds::zvhd_images, Shape::Image),
    Target::new("raw", |input| images::image(ImageFormat::Raw, input), seeds::raw_images, Shape::Image),
    Target::new("chain", images::chain, seeds::chains, Shape::Chain),
    Target::new("descriptor", images::descriptor, seeds::descriptors, Shape::Text),
    Target::new("sidecar", records::sidecar, documents::sidecars, Shape::Text),
    Target::new("policy", records::policy, documents::policies, Shape::Text),
    Target::new("configuration", records::configuration, documents::configurations, Shape::Text),
    Target::new("status", records::status, documents::statuses, Shape::Text),
    Target::new("journal", records::journal, documents::records, Shape::Text),
    Target::new("upload_log", records::upload_log, documents::logs, Shape::Text),
    Target::new("bucket_records", records::bucket_records, documents::bucket_records, Shape::Text),
    Target::new("lengths", records::lengths, documents::lengths, Shape::Text),
    Target::new("answers", records::answers, documents::answers, Shape::Text),
    Target::new("names", records::names, documents::names, Shape::Text),
];

/// The target of that name.
pub fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a target has this name")
}
