//! `cargo xtask fuzz`: random inputs for as long as one likes.
//!
//! | file | targets |
//! |---|---|
//! | [`build_machine`] | bytes that make no sense, for everything that reads bytes of others: crate `deed-fuzz` |
//! | [`guided`] | the same, under libFuzzer |
//! | [`emulator`] | random calls in QEMU, beside the specification |

mod build_machine;
mod emulator;
mod guided;

use crate::report::Report;
use crate::tree::Tree;
use anyhow::{Result, ensure};
use std::path::PathBuf;

/// What is fuzzed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    /// Registers of calls, and syndromes.
    Decode,
    /// Device trees and image headers.
    DeviceTree,
    /// Sequences of calls by host and guests, on a simulated machine.
    Calls,
    /// The host's ramdisk and programs.
    Files,
    /// Random calls and accesses of a hostile host and of real guests in QEMU, beside the specification.
    Emulator,
}

/// Fuzz decoding, device trees, sequences of calls and files on the build machine, and random calls in QEMU.
///
/// On the build machine the committed corpus of each target is played, then mutations of it; an input that fails is
/// made small and kept in target/fuzz-failures. In QEMU the hypervisor is compared with the specification after each
/// call; at a difference the story is printed, with the words that show it again.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these targets.
    #[arg(long, value_enum)]
    target: Vec<Target>,
    /// How long each target runs; 30 unless something else ends the run.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// The same seed plays the same inputs in the same order.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// On the build machine: under libFuzzer, which goes by the code that an input reaches.
    #[arg(long, conflicts_with_all = ["input", "write_corpus", "in-the-emulator"])]
    guided: bool,
    #[command(flatten)]
    build_machine: build_machine::Args,
    #[command(flatten)]
    emulator: emulator::Args,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print command lines.
    #[arg(long, short)]
    verbose: bool,
}

impl Args {
    fn wants(&self, target: Target) -> bool {
        match self.target.as_slice() {
            // What only one side understands says which is meant.
            [] if self.emulator.is_asked_for() => target == Target::Emulator,
            [] if self.guided || self.build_machine.is_asked_for() => target != Target::Emulator,
            [] => true,
            targets => targets.contains(&target),
        }
    }
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    Report::new("fuzz").around(args.json.as_deref(), |report| {
        if args.guided {
            ensure!(
                !args.target.contains(&Target::Emulator),
                "only targets of the build machine can be guided"
            );
            return guided::run(tree, args, report);
        }
        let quiet = build_machine::run(tree, args, report)?;
        Ok(emulator::run(tree, args, report)? && quiet)
    })
}
