//! Fuzzing: bytes that somebody else wrote, thrown at everything in Deed that reads such bytes.
//!
//! | module | what it holds |
//! |---|---|
//! | [`decode`] | target: registers of host, guest and firmware calls, syndromes, exits |
//! | [`device_tree`] | target: device trees and image headers, to the plan and the host's tree |
//! | [`calls`] | target: sequences of calls by a hostile host and its guests, on a simulated machine |
//! | [`files`] | target: the host's ramdisk and programs |
//! | [`machine`] | the machine under `calls`: it refuses EL2 any look at memory that others reach |
//! | [`input`] | values out of bytes |
//! | [`mutate`] | new inputs out of old ones |
//! | [`engine`] | the loop: corpus, mutations, what is kept, what failed, and the smallest input that still fails |
//!
//! A target is a function of bytes that panics when a promise is broken. It notes what came of its input in
//! [`Outcomes`]: an input with an outcome that none had before is kept and mutated further, which finds its way
//! without instrumentation of the compiler. The same seed plays the same inputs in the same order.

#![forbid(unsafe_code)]

pub mod calls;
pub mod decode;
pub mod device_tree;
pub mod engine;
pub mod files;
pub mod input;
pub mod machine;
pub mod mutate;

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which is that of its folder in the corpus.
    pub name: &'static str,
    /// Plays one input.
    pub run: fn(&[u8], &mut Outcomes),
    /// Inputs are no longer than this.
    pub longest: usize,
    /// Its corpus has no more inputs than this.
    pub most: usize,
}

/// All targets.
pub const TARGETS: [Target; 4] = [
    Target { name: "decode", run: decode::run, longest: 128, most: 50 },
    Target { name: "device-tree", run: device_tree::run, longest: 4096, most: 40 },
    Target { name: "calls", run: calls::run, longest: 400, most: 60 },
    Target { name: "files", run: files::run, longest: 2048, most: 30 },
];

impl Target {
    /// The folder of its committed inputs.
    pub fn corpus(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name)
    }
}

/// What came of one input: the coverage that guides the engine.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    seen: Vec<u64>,
    steps: u64,
}

impl Outcomes {
    /// Notes something that happened. Say what kind of thing it was, not which of a million.
    pub fn note(&mut self, what: impl Hash) {
        // Its keys are fixed: the same outcome is the same number in every run.
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        self.seen.push(hasher.finish());
    }

    /// Counts one thing done of the several that an input may ask for.
    pub fn step(&mut self) {
        self.steps += 1;
    }

    /// How many that were. An input that is one thing counts none.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// What was noted.
    pub fn seen(&self) -> &[u64] {
        &self.seen
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.seen.clear();
        self.steps = 0;
    }
}
