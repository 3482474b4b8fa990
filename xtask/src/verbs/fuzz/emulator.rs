//! Random calls and accesses of a hostile host and of real guests in QEMU, beside the specification.
//!
//! A program of calls follows from the seed and its number alone.

use super::Target;
use super::build_machine::SECONDS;
use crate::boot::{self, Options, Outcome};
use crate::console::Random;
use crate::images::Builder;
use crate::report::{Check, Fuzzed, Played, Report};
use crate::scenario::{Overrides, Scenario};
use crate::toolchain::{Need, Toolchain};
use crate::tree::Tree;
use crate::ui::seconds;
use anyhow::Result;

/// The scenario whose program plays random calls.
const SCENARIO: &str = "random-calls-agree-with-the-specification";
/// Seconds that a boot may take besides what was asked for.
const SLACK: u64 = 120;
/// A run of a number of calls is given up if it makes fewer a second than this.
const LEAST_CALLS_A_SECOND: u64 = 100;

/// What only this target understands.
#[derive(Debug, clap::Args)]
#[group(id = "in-the-emulator")]
pub(super) struct Args {
    /// In QEMU: stop after this many calls.
    #[arg(long, value_name = "N")]
    calls: Option<u64>,
    /// In QEMU: play only the program of this number, as a difference names it.
    #[arg(long, value_name = "N")]
    program: Option<u64>,
    /// In QEMU: CPUs of the machine. With 2, many calls are made two at a time; which is the first is then another thing
    /// in every run.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=2))]
    cpus: Option<u32>,
    /// In QEMU: count instructions for time, so that each instruction of the run is the same in every run.
    #[arg(long)]
    replay: bool,
    /// In QEMU: RAM of the machine, such as 512M or 16G.
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// In QEMU: CPU model: cortex-a53, cortex-a76, max, or another that QEMU knows.
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
}

impl Args {
    pub(super) fn is_asked_for(&self) -> bool {
        self.calls.is_some() || self.program.is_some() || self.cpus.is_some() || self.replay
    }
}

/// Runs this target, if it is wanted.
pub(super) fn run(tree: &Tree, args: &super::Args, report: &mut Report) -> Result<bool> {
    if args.wants(Target::Emulator) { play(tree, args, report) } else { Ok(true) }
}

fn play(tree: &Tree, args: &super::Args, report: &mut Report) -> Result<bool> {
    let mut scenario = Scenario::load(tree, SCENARIO)?;
    scenario.args = program_arguments(args);
    let emulator = &args.emulator;
    let smp = Some(emulator.cpus.unwrap_or(1));
    let by_hand = Overrides { memory: emulator.memory.clone(), cpu: emulator.cpu.clone(), smp };
    let machine = scenario.machine(&by_hand);
    report.env.rustc = Toolchain::version_of_build_machine();
    report.env.note_machine(&machine);
    let toolchain = Toolchain::ensure(&[Need::Build, Need::Qemu])?;
    toolchain.note_versions(&mut report.env);

    let builder = Builder::new(tree, &toolchain, false, args.verbose);
    let options = Options {
        live: true,
        verbose: args.verbose,
        replay: args.emulator.replay,
        timeout: Some(time_limit(args)),
        label: "fuzz-emulator".to_owned(),
        ..Options::default()
    };
    let outcome = boot::scenario(tree, &builder, &scenario, &machine, &options)?;
    let fuzzed = outcome.console.random.map(|random| Fuzzed::of("emulator", &random, outcome.duration));
    let mut checks = outcome.checks.clone();
    if let Some(least) =
        args.emulator.calls.filter(|_| args.seconds.is_none() && args.emulator.program.is_none())
    {
        let calls = outcome.console.random.map_or(0, |random| random.calls);
        checks.push(Check::new("calls", format!("{least} or more"), calls.to_string(), calls >= least));
    }
    let pass = checks.iter().all(|check| check.pass);
    tell(tree, args, &outcome, &checks, fuzzed.as_ref());
    report.add(checks);
    report.fuzzed.get_or_insert_default().extend(fuzzed);
    Ok(pass)
}

/// The words that the program of the scenario is given.
fn program_arguments(args: &super::Args) -> Vec<String> {
    let seconds = match (args.seconds, args.emulator.calls, args.emulator.program) {
        (None, None, None) => Some(SECONDS),
        (seconds, ..) => seconds,
    };
    let words = [
        ("seed", Some(args.seed)),
        ("calls", args.emulator.calls),
        ("seconds", seconds),
        ("program", args.emulator.program),
        ("cpus", args.emulator.cpus.map(u64::from)),
    ];
    words.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?))).collect()
}

/// Seconds after which the run has failed.
fn time_limit(args: &super::Args) -> u64 {
    let for_calls = args.emulator.calls.map_or(SECONDS, |calls| calls / LEAST_CALLS_A_SECOND);
    let work = args.seconds.unwrap_or(for_calls);
    // Counted instructions have their own time, which can be many times slower.
    (if args.emulator.replay { work.saturating_mul(20) } else { work }).saturating_add(SLACK)
}

fn tell(tree: &Tree, args: &super::Args, outcome: &Outcome, checks: &[Check], fuzzed: Option<&Fuzzed>) {
    for check in checks.iter().filter(|check| !check.pass) {
        println!("FAIL {}", check.complaint());
    }
    let verdict = if checks.iter().all(|check| check.pass) { "PASSED" } else { "FAILED" };
    let played = match fuzzed.map(|fuzzed| &fuzzed.played) {
        Some(Played::Programs { programs, calls, pairs, calls_per_second }) => format!(
            "{calls} calls in {programs} programs, {calls_per_second} a second; {pairs} pairs of a call and an \
             outcome"
        ),
        _ => "no count of calls was seen".to_owned(),
    };
    println!(
        "{verdict}: seed {}: {played}; {} (console: {})",
        args.seed,
        seconds(outcome.duration),
        tree.show(&outcome.log)
    );
}

impl Fuzzed {
    /// What the program has counted, in so much time: with its boot, and of this machine, since that of a machine
    /// whose instructions are counted is another.
    fn of(target: &'static str, random: &Random, duration: std::time::Duration) -> Self {
        let Random { seed, programs, calls, pairs, .. } = *random;
        let milliseconds = duration.as_millis().max(1) as u64;
        let calls_per_second = calls.saturating_mul(1000) / milliseconds;
        Self { target, seed, played: Played::Programs { programs, calls, pairs, calls_per_second } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Console;
    use clap::Parser;
    use std::time::Duration;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: super::super::Args,
    }

    fn words(line: &str) -> Vec<String> {
        let line = Line::try_parse_from(["fuzz"].into_iter().chain(line.split_whitespace())).unwrap();
        program_arguments(&line.args)
    }

    #[test]
    fn the_program_is_told_what_was_asked_for_and_no_run_is_endless() {
        assert_eq!(words(""), ["seed=1", "seconds=30"]);
        assert_eq!(words("--seed 7 --seconds 5"), ["seed=7", "seconds=5"]);
        assert_eq!(words("--calls 1000"), ["seed=1", "calls=1000"]);
        assert_eq!(words("--seed 3 --program 9"), ["seed=3", "program=9"]);
        assert_eq!(words("--cpus 2 --calls 9"), ["seed=1", "calls=9", "cpus=2"]);
    }

    #[test]
    fn calls_are_counted_in_seconds_of_this_machine() {
        let line = "FUZZ seed=2 programs=3 calls=400 aborts=5 pairs=6 nanoseconds=1\n";
        let random = Console::parse(line).random.unwrap();
        let fuzzed = Fuzzed::of("emulator", &random, Duration::from_millis(200));
        let played = Played::Programs { programs: 3, calls: 400, pairs: 6, calls_per_second: 2000 };
        assert_eq!(fuzzed, Fuzzed { target: "emulator", seed: 2, played });
    }
}
