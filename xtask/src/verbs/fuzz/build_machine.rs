//! Targets on the build machine: those of the crate `deed-fuzz`, which reads the bytes of others and must not fail.

use super::Target;
use crate::report::{Check, Report};
use crate::toolchain::Toolchain;
use crate::tree::Tree;
use crate::ui::command_line;
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// How long a target runs if nobody says.
pub(super) const SECONDS: u64 = 30;

impl Target {
    /// All that run on the build machine, by their names there.
    pub(super) const ON_THE_BUILD_MACHINE: [(Self, &str); 4] = [
        (Self::Decode, "decode"),
        (Self::DeviceTree, "device-tree"),
        (Self::Calls, "calls"),
        (Self::Files, "files"),
    ];
}

/// What only these targets understand.
#[derive(Debug, clap::Args)]
#[group(id = "on-the-build-machine")]
pub(super) struct Args {
    /// Play this file once; needs one --target.
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
    /// Replace the corpus by the smallest that has all outcomes of this run.
    #[arg(long, conflicts_with = "input")]
    write_corpus: bool,
}

impl Args {
    pub(super) fn is_asked_for(&self) -> bool {
        self.input.is_some() || self.write_corpus
    }
}

/// Runs those targets that are wanted.
pub(super) fn run(tree: &Tree, args: &super::Args, report: &mut Report) -> Result<bool> {
    let wanted = Target::ON_THE_BUILD_MACHINE.iter().filter(|(target, _)| args.wants(*target));
    let names: Vec<&str> = wanted.map(|(_, name)| *name).collect();
    if names.is_empty() {
        return Ok(true);
    }
    report.env.rustc = Toolchain::version_of_build_machine();
    let mut command = Command::new("cargo");
    command.args(["run", "--quiet", "--package", "deed-fuzz", "--profile", "fuzz", "--"]);
    for name in &names {
        command.args(["--target", name]);
    }
    let seconds = args.seconds.unwrap_or(SECONDS);
    command.args(["--seconds", &seconds.to_string(), "--seed", &args.seed.to_string()]);
    command.arg("--failures").arg(tree.target.join("fuzz-failures"));
    if let Some(input) = &args.build_machine.input {
        command.arg("--input").arg(std::path::absolute(input)?);
    }
    if args.build_machine.write_corpus {
        command.arg("--write-corpus");
    }
    command.current_dir(&tree.root).stdin(Stdio::null()).stdout(Stdio::piped());
    if args.verbose {
        eprintln!("{}", command_line(&command));
    }
    let mut child = command.spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("no output")?;
    let mut checks = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{}", line.strip_prefix("FUZZ ").unwrap_or(&line));
        checks.extend(check_of(&line));
    }
    let pass = child.wait()?.success();
    if args.build_machine.input.is_some() {
        return Ok(pass);
    }
    let missing = names.iter().find(|name| !checks.iter().any(|check| check.name == **name));
    report.steps.get_or_insert_default().extend(checks);
    ensure!(missing.is_none(), "{} has no result: it crashed or hung", missing.unwrap_or(&""));
    println!("{}: {} targets", if pass { "PASSED" } else { "FAILED" }, names.len());
    Ok(pass)
}

/// A target's result: `FUZZ name: figures: what failed`.
fn check_of(line: &str) -> Option<Check> {
    const EXPECTED: &str = "nothing failed";
    let (name, rest) = line.strip_prefix("FUZZ ")?.split_once(": ")?;
    Some(Check::new(name, EXPECTED, rest, rest.ends_with(EXPECTED)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_passes_if_nothing_failed() {
        let good =
            check_of("FUZZ calls: 10 executions in 1.0 s, 10 a second, seed 1: nothing failed").unwrap();
        assert!(good.pass && good.name == "calls");
        let bad =
            check_of("FUZZ calls: 10 executions, seed 1: two guests reach page 4 (input: a.bin)").unwrap();
        assert!(!bad.pass && bad.observed.contains("page 4"));
        assert_eq!(check_of("a line of somebody else"), None);
    }
}
