//! Deed's commands. `cargo xtask` lists them.
//!
//! | module | what it owns |
//! |---|---|
//! | [`verbs`] | one file per command |
//! | [`toolchain`] | which compiler builds for the bare machine, and how it is called |
//! | [`images`] | building the images; [`elf`] and [`cpio`] are the formats |
//! | [`scenario`] | the files of `qemu/scenarios` |
//! | [`emulator`], [`linux`] | QEMU and Linux, where they come from; [`debian`] is how |
//! | [`boot`] | one run of QEMU, from the command line to the checks |
//! | [`console`] | what a console says, and whether that is a pass |
//! | [`aftermath`] | the memory that a run leaves behind, and what must not be in it: [`ram`], [`secret`], [`stage2`] |
//! | [`oracle`] | what the oracle build says of itself |
//! | [`patch`], [`libtest`] | seeded faults, and what the tests said about them |
//! | [`budget`] | what each counted operation may cost, and what it costs in pKVM |
//! | [`report`], [`ui`] | what people and machines are told |

#![forbid(unsafe_code)]

mod aftermath;
mod boot;
mod budget;
mod console;
mod cpio;
mod debian;
mod devicetree;
mod elf;
mod emulator;
mod entries;
mod follow;
mod images;
mod libtest;
mod linux;
mod oracle;
mod patch;
mod ram;
mod report;
mod scenario;
mod secret;
mod stage2;
mod toolchain;
mod tree;
mod ui;
mod verbs;

use clap::Parser;
use std::process::ExitCode;

/// Build, boot and test Deed. Every command sets up what it lacks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    Abi(verbs::abi::Args),
    Setup(verbs::setup::Args),
    Qemu(verbs::qemu::Args),
    Test(verbs::test::Args),
    Lint(verbs::lint::Args),
    Mutants(verbs::mutants::Args),
    Model(verbs::model::Args),
    Fuzz(verbs::fuzz::Args),
    Bench(verbs::bench::Args),
    Coverage(verbs::coverage::Args),
}

fn main() -> ExitCode {
    let done = tree::Tree::of_this_checkout().and_then(|tree| match Cli::parse().verb {
        Verb::Abi(args) => verbs::abi::run(&tree, &args),
        Verb::Setup(args) => verbs::setup::run(&tree, &args),
        Verb::Qemu(args) => verbs::qemu::run(&tree, &args),
        Verb::Test(args) => verbs::test::run(&tree, &args),
        Verb::Lint(args) => verbs::lint::run(&tree, &args),
        Verb::Mutants(args) => verbs::mutants::run(&tree, &args),
        Verb::Model(args) => verbs::model::run(&args),
        Verb::Fuzz(args) => verbs::fuzz::run(&tree, &args),
        Verb::Bench(args) => verbs::bench::run(&tree, &args),
        Verb::Coverage(args) => verbs::coverage::run(&tree, &args),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
