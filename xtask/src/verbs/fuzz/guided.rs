//! The same targets under libFuzzer: what code an input reaches decides which inputs lead on. It is slower than the
//! engine of `deed-fuzz`, and finds more in hours.
//!
//! All code is built once more, in `target/guided`, with counters at its branches and comparisons
//! (`-C passes=sancov-module`, which a stable compiler has too). Inputs that reach something new are kept in
//! `target/fuzz-corpus`, from which a later run goes on.

use super::Target;
use crate::report::{Check, Fuzzed, Played, Report};
use crate::toolchain::Toolchain;
use crate::tree::Tree;
use crate::ui::{Task, command_line};
use anyhow::{Context, Result, bail, ensure};
use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What makes the compiler count for libFuzzer.
const COUNTERS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";
/// With a target of its own, build scripts and macros are built without counters.
const BUILD_MACHINE: &str = "x86_64-unknown-linux-gnu";
/// Lines of libFuzzer's that are shown when an input fails.
const TAIL: usize = 40;

/// Runs those targets that are wanted, one after the other.
pub(super) fn run(tree: &Tree, args: &super::Args, report: &mut Report) -> Result<bool> {
    ensure!(
        cfg!(all(target_arch = "x86_64", target_os = "linux")),
        "libFuzzer is only built for {BUILD_MACHINE} here"
    );
    report.env.rustc = Toolchain::version_of_build_machine();
    let program = build(tree, args.verbose)?;
    let wanted = Target::ON_THE_BUILD_MACHINE.iter().filter(|(target, _)| args.wants(*target));
    let mut pass = true;
    for (_, name) in wanted {
        let (check, fuzzed) = fuzz(tree, args, &program, name)?;
        pass &= check.pass;
        report.add([check]);
        report.fuzzed.get_or_insert_default().extend(fuzzed);
    }
    println!("{}", if pass { "PASSED" } else { "FAILED" });
    Ok(pass)
}

/// Builds the targets with counters. Returns the program.
fn build(tree: &Tree, verbose: bool) -> Result<PathBuf> {
    let target = tree.target.join("guided");
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--locked", "--target", BUILD_MACHINE]);
    cargo.env("RUSTFLAGS", COUNTERS).env("CARGO_TARGET_DIR", &target);
    cargo.current_dir(tree.root.join("fuzz/guided")).stdin(Stdio::null());
    if verbose {
        eprintln!("{}", command_line(&cargo));
    }
    let task =
        Task::begin("building the fuzz targets with counters, and libFuzzer (a C++ compiler is needed)");
    let status = cargo.status().context("cannot start cargo")?;
    ensure!(status.success(), "the fuzz targets do not build with counters");
    task.done("built");
    Ok(target.join(BUILD_MACHINE).join("release/deed-fuzz-guided"))
}

/// Runs one target.
fn fuzz(
    tree: &Tree,
    args: &super::Args,
    program: &Path,
    name: &'static str,
) -> Result<(Check, Option<Fuzzed>)> {
    let kept = tree.target.join("fuzz-corpus").join(name);
    let failures = tree.target.join("fuzz-failures");
    fs::create_dir_all(&kept)?;
    fs::create_dir_all(&failures)?;
    let mut fuzzer = Command::new(program);
    fuzzer.arg(&kept).arg(tree.root.join("fuzz/corpus").join(name));
    fuzzer.arg(format!("-max_total_time={}", args.seconds.unwrap_or(super::build_machine::SECONDS)));
    fuzzer.arg(format!("-seed={}", args.seed));
    fuzzer.arg(format!("-artifact_prefix={}/{name}-", failures.display()));
    // Memory for records is leaked on purpose, to be used again by the next machine.
    fuzzer.args(["-print_final_stats=1", "-timeout=30", "-detect_leaks=0"]);
    fuzzer.env("DEED_FUZZ_TARGET", name).stdin(Stdio::null()).stderr(Stdio::piped());
    if args.verbose {
        eprintln!("{}", command_line(&fuzzer));
    }
    let task = Task::begin(format!("{name} under libFuzzer"));
    let mut child = fuzzer.spawn().context("cannot start the fuzz targets")?;
    let mut told = Told::default();
    for line in BufReader::new(child.stderr.take().context("no output")?).lines() {
        let line = line?;
        if args.verbose {
            eprintln!("{line}");
        }
        told.listen(line);
    }
    let failed = !child.wait()?.success();
    let observed = told.result(failed)?;
    task.done(&observed);
    if failed && !args.verbose {
        told.tail.iter().for_each(|line| eprintln!("{line}"));
    }
    println!("{name}: {observed}");
    let fuzzed = told.played().map(|played| Fuzzed { target: name, seed: args.seed, played });
    Ok((Check::new(name, "nothing failed", observed, !failed), fuzzed))
}

/// What libFuzzer has said.
#[derive(Debug, Default)]
struct Told {
    executions: Option<u64>,
    per_second: Option<u64>,
    covered: Option<u64>,
    input: Option<String>,
    tail: VecDeque<String>,
}

impl Told {
    fn listen(&mut self, line: String) {
        let number = |key: &str| line.split_once(key)?.1.split_whitespace().next()?.parse().ok();
        self.executions = number("stat::number_of_executed_units:").or(self.executions);
        self.per_second = number("stat::average_exec_per_sec:").or(self.per_second);
        self.covered = number(" cov: ").or(self.covered);
        if let Some((_, path)) = line.split_once("Test unit written to ") {
            self.input = Some(path.to_owned());
        }
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }

    /// How much was played. That is not judged: counters cost time, and inputs become longer.
    fn played(&self) -> Option<Played> {
        let (executions, executions_per_second) = self.executions.zip(self.per_second)?;
        Some(Played::Inputs { executions, executions_per_second, steps_per_second: None })
    }

    /// One line of what was seen.
    fn result(&self, failed: bool) -> Result<String> {
        let end = match (failed, &self.input) {
            (false, _) => "nothing failed".to_owned(),
            (true, Some(input)) => format!("failed (input: {input})"),
            (true, None) => "libFuzzer failed, without an input".to_owned(),
        };
        match (self.executions, self.per_second, self.covered) {
            (Some(executions), Some(rate), Some(covered)) => {
                Ok(format!("{executions} executions, {rate} a second, {covered} branches reached: {end}"))
            }
            _ if failed => Ok(end),
            _ => bail!("libFuzzer ended without figures:\n{:?}", self.tail),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_becomes_one_line() {
        let mut told = Told::default();
        for line in [
            "#8192\tpulse  cov: 5126 ft: 20111 corp: 1001/98Kb lim: 388 exec/s: 682 rss: 88Mb",
            "stat::number_of_executed_units: 40229",
            "stat::average_exec_per_sec:     659",
        ] {
            told.listen(line.to_owned());
        }
        let played = Played::Inputs { executions: 40229, executions_per_second: 659, steps_per_second: None };
        assert_eq!(told.played(), Some(played));
        let seen = "40229 executions, 659 a second, 5126 branches reached: ";
        assert_eq!(told.result(false).unwrap(), format!("{seen}nothing failed"));
        told.listen("artifact_prefix='x/'; Test unit written to x/calls-crash-12".to_owned());
        assert_eq!(told.result(true).unwrap(), format!("{seen}failed (input: x/calls-crash-12)"));
        assert!(Told::default().result(false).is_err());
    }
}
