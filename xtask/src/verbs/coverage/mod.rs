//! `cargo xtask coverage`: how much of the code the tests run.
//!
//! | file | what is counted |
//! |---|---|
//! | [`sources`] | lines and branches of `hyp`, `spec` and `abi`, on the build machine |
//! | [`image`] | instructions of the EL2 image, in QEMU |
//! | [`flow`] | which of them can lead to nothing but a panic |

mod flow;
mod image;
mod sources;

use crate::report::{Check, Covered, Report, Rows};
use crate::toolchain::Toolchain;
use crate::tree::Tree;
use anyhow::Result;
use std::path::PathBuf;

/// Tell which lines and branches of hyp, spec and abi the tests of the build machine run, and which instructions of the
/// EL2 image the boots of qemu/scenarios.
///
/// Fails below 95 % of lines, 85 % of branches or 85 % of instructions. Installs Debian's LLVM of the compiler's
/// version, for its readers of profiles, if neither that nor rustup's llvm-tools are there.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only lines and branches, on the build machine.
    #[arg(long, conflicts_with = "emulator")]
    unit: bool,
    /// Only instructions, in QEMU.
    #[arg(long)]
    emulator: bool,
    /// Pass although a target is missed.
    #[arg(long)]
    accept_below: bool,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print command lines, and what no test runs.
    #[arg(long, short)]
    verbose: bool,
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    Report::new("coverage").around(args.json.as_deref(), |report| {
        report.env.rustc = Toolchain::version_of_build_machine();
        let (mut checks, mut rows) = (Vec::new(), Vec::new());
        if !args.emulator {
            let (more, lines) = sources::measure(tree, args.verbose)?;
            checks.extend(more);
            rows.extend(lines);
            // They stay if the boots cannot be made.
            report.steps = Some(checks.clone());
            report.rows = Some(Rows::Covered(rows.clone()));
        }
        if !args.unit {
            let (more, instructions) = image::measure(tree, args, &mut report.env)?;
            image::tell(&instructions, args.verbose);
            checks.extend(more);
            rows.extend(instructions);
        }
        rows.sort_by_key(|row| row.target.is_none());
        let pass = tell(&checks, &rows, args.accept_below);
        report.steps = Some(checks);
        report.rows = Some(Rows::Covered(rows));
        Ok(pass)
    })
}

/// Prints the totals beside their targets, and the verdict.
fn tell(checks: &[Check], rows: &[Covered], accept_below: bool) -> bool {
    println!("{:12} {:>9} {:>9} {:>9} {:>9}", "total", "covered", "of", "percent", "target");
    let mut below = Vec::new();
    let mut words = Vec::new();
    for row in rows {
        let Some(target) = row.target else { continue };
        let Covered { what, covered, total, percent, .. } = row;
        let mark = if row.is_enough() { "" } else { " BELOW" };
        println!("{what:12} {covered:>9} {total:>9} {percent:>9.1} {target:>9}{mark}");
        words.push(format!("{percent:.1} % of {what}"));
        below.extend((!row.is_enough()).then_some(*what));
    }
    println!();
    let failed = checks.iter().filter(|check| !check.pass);
    failed.for_each(|check| println!("FAILED {}", check.complaint()));
    let pass = (below.is_empty() || accept_below) && checks.iter().all(|check| check.pass);
    let verdict = if pass { "PASSED" } else { "FAILED" };
    let but = match below.as_slice() {
        [] => String::new(),
        below => format!("; below the target: {}", below.join(", ")),
    };
    println!("{verdict}: {}{but}", words.join(", "));
    pass
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_target_fails_unless_it_is_accepted() {
        let lines = Covered::new("lines", 95, 100).against(95);
        let branches = Covered::new("branches", 849, 1000).against(85);
        assert!(tell(&[], &[lines.clone(), Covered::new("lines", 1, 9).of_file("a.rs")], false));
        assert!(!tell(&[], &[lines.clone(), branches.clone()], false));
        assert!(tell(&[], &[lines.clone(), branches], true));
        let failed = Check::new("unit", "0 failed", "1 failed", false);
        assert!(!tell(&[failed], &[lines], true));
    }
}
