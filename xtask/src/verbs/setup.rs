//! `cargo xtask setup`: installs what the other commands need. They call the same code for what they lack.

use crate::emulator::Emulator;
use crate::toolchain::{self, Need, Toolchain};
use crate::tree::Tree;
use anyhow::Result;

/// Install what is missing: a compiler for the target, QEMU, clippy for the target.
///
/// Asks before it installs at a terminal; installs unasked where there is none or CI is set.
/// DEED_TOOLCHAIN=rustup or debian chooses where the compiler comes from.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print every package and tool that would be installed, and do nothing.
    #[arg(long)]
    plan: bool,
}

/// Runs the command.
pub(crate) fn run(_tree: &Tree, args: &Args) -> Result<bool> {
    if args.plan {
        print!("{}", toolchain::plan());
        return Ok(true);
    }
    let toolchain = Toolchain::ensure(&Need::ALL)?;
    println!("compiler: {}", toolchain.describe());
    println!("emulator: {}", Emulator::default().version().unwrap_or_default());
    println!("everything is there: try `cargo xtask qemu`");
    Ok(true)
}
