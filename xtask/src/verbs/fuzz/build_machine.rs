//! Targets on the build machine: those of the crate `deed-fuzz`, which reads the bytes of others and must not fail.

use super::Target;
use crate::report::{Check, Fuzzed, Played, Report};
use crate::toolchain::Toolchain;
use crate::tree::Tree;
use crate::ui::command_line;
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::str::FromStr;

/// How long a target runs if nobody says.
pub(super) const SECONDS: u64 = 30;
/// What a target plays in a second at the least: inputs, or, where an input is several steps, steps.
///
/// A second is one of processor time, so that a busy machine does not count as a slow one, and code is optimised: the
/// slowest target then makes twice as many steps on a machine of our days. So there is no margin beside that.
const LEAST_A_SECOND: u64 = 20_000;
/// Seconds of processor time after which a rate is worth a judgement: before, much of it is the corpus.
const LEAST_SECONDS: f64 = 5.0;

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
        let Some(check) = check_of(&line) else { continue };
        let nothing_failed = check.pass;
        checks.push(check);
        if let Some(figures) = names.iter().find_map(|name| Figures::read(name, args.seed, &line)) {
            // One that has failed is told of as such.
            let rate = figures.judge().filter(|_| nothing_failed);
            rate.iter().filter(|rate| !rate.pass).for_each(|rate| println!("FAIL {}", rate.complaint()));
            checks.extend(rate);
            report.fuzzed.get_or_insert_default().push(figures.fuzzed);
        }
    }
    let succeeded = child.wait()?.success();
    if args.build_machine.input.is_some() {
        return Ok(succeeded);
    }
    let missing = names.iter().find(|name| !checks.iter().any(|check| check.name == **name));
    let pass = succeeded && checks.iter().all(|check| check.pass);
    report.add(checks);
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

/// The figures of a target's result.
#[derive(Clone, Debug, PartialEq)]
struct Figures {
    fuzzed: Fuzzed,
    /// Of processor time.
    seconds: f64,
}

impl Figures {
    /// Reads those of this target: `N executions in T s of a processor, R a second (S steps a second)`.
    fn read(target: &'static str, seed: u64, line: &str) -> Option<Self> {
        let figures = line.strip_prefix("FUZZ ")?.strip_prefix(target)?.strip_prefix(": ")?;
        let played = Played::Inputs {
            executions: number_before(figures, " executions")?,
            executions_per_second: number_before(figures, " a second")?,
            steps_per_second: number_before(figures, " steps a second"),
        };
        let seconds = number_before(figures, " s of a processor")?;
        Some(Self { fuzzed: Fuzzed { target, seed, played }, seconds })
    }

    /// Whether it was fast enough, if it ran for long enough to say.
    fn judge(&self) -> Option<Check> {
        let Played::Inputs { executions_per_second, steps_per_second, .. } = self.fuzzed.played else {
            return None;
        };
        let (unit, rate) = match steps_per_second {
            Some(steps) => ("steps", steps),
            None => ("executions", executions_per_second),
        };
        (self.seconds >= LEAST_SECONDS).then(|| {
            let name = format!("{}: {unit} a second", self.fuzzed.target);
            Check::new(&name, format!("{LEAST_A_SECOND} or more"), rate.to_string(), rate >= LEAST_A_SECOND)
        })
    }
}

/// The number right before the first of these words.
fn number_before<T: FromStr>(text: &str, words: &str) -> Option<T> {
    text.split_once(words)?.0.rsplit([' ', '(']).next()?.parse().ok()
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

    fn figures(seconds: &str, rates: &str) -> Figures {
        let line = format!("FUZZ calls: 90 executions in {seconds} s of a processor, {rates}, seed 1: x");
        Figures::read("calls", 1, &line).unwrap()
    }

    #[test]
    fn figures_are_read_from_the_line_of_their_target() {
        let Figures { fuzzed, seconds } = figures("6.5", "13 a second (250 steps a second)");
        let played =
            Played::Inputs { executions: 90, executions_per_second: 13, steps_per_second: Some(250) };
        assert_eq!((fuzzed, seconds), (Fuzzed { target: "calls", seed: 1, played }, 6.5));
        assert_eq!(Figures::read("files", 1, "FUZZ calls: 90 executions in 1.0 s of a processor"), None);
        assert_eq!(Figures::read("calls", 1, "calls: 9 bytes, 3 outcomes, nothing failed"), None);
    }

    #[test]
    fn a_target_that_is_too_slow_fails_by_its_steps_where_it_has_any() {
        let judged = |rates: &str| figures("5.0", rates).judge().unwrap();
        assert!(judged("20000 a second").pass);
        let slow = "calls: executions a second: expected 20000 or more, observed 19999";
        assert_eq!(judged("19999 a second").complaint(), slow);
        assert!(judged("1000 a second (20000 steps a second)").pass);
        let slow = "calls: steps a second: expected 20000 or more, observed 19999";
        assert_eq!(judged("30000 a second (19999 steps a second)").complaint(), slow);
    }

    #[test]
    fn a_target_that_ran_for_a_moment_is_not_judged() {
        assert_eq!(figures("4.9", "1 a second").judge(), None);
    }
}
