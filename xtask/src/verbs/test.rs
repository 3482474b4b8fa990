//! `cargo xtask test`: the tests of the build machine, those whose schedule shuttle decides, then one boot per
//! scenario and machine.

use crate::boot::{self, Options, Outcome};
use crate::emulator::{Emulator, Which};
use crate::images::Builder;
use crate::libtest::{Summary, Tried, result_line, under_shuttle};
use crate::linux;
use crate::report::{Check, Report};
use crate::scenario::{Matrix, Overrides, Scenario};
use crate::toolchain::{Need, Toolchain};
use crate::tree::Tree;
use crate::ui::{command_line, seconds};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// The grid of --matrix.
const MEMORIES: [&str; 5] = ["512M", "513M", "1G", "4G", "16G"];
const NUMBERS: [u32; 4] = [1, 2, 4, 8];
const CPUS: [&str; 3] = ["cortex-a53", "cortex-a76", "max"];

/// Run all tests: unit tests on the build machine, pairs of calls under schedules of several CPUs, then the boots of
/// qemu/scenarios.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only tests and boots whose name contains this.
    filter: Option<String>,
    /// Only the tests of the build machine.
    #[arg(long, conflicts_with_all = ["threads", "emulator", "matrix"])]
    unit: bool,
    /// Only the pairs of calls under schedules of several CPUs. DEED_SCHEDULES is the number of schedules of each.
    #[arg(long, conflicts_with_all = ["emulator", "matrix"])]
    threads: bool,
    /// Only the boots.
    #[arg(long)]
    emulator: bool,
    /// Only the boots that are marked for it, on every machine of their grid: memory 512M, 513M, 1G, 4G, 16G, or 1, 2,
    /// 4, 8 CPUs, by CPU model cortex-a53, cortex-a76, max.
    #[arg(long)]
    matrix: bool,
    /// Boot images without test calls and with full optimisation.
    #[arg(long)]
    release: bool,
    /// Boots at a time. Those that keep several CPUs busy run by themselves all the same. As many as this machine has
    /// CPUs if not given, and 1 with --verbose.
    #[arg(long, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Which QEMU boots: the installed one, or the newest of Debian, fetched once.
    #[arg(long, value_enum, default_value_t)]
    qemu: Which,
    /// Print command lines, and consoles while they are written.
    #[arg(long, short)]
    verbose: bool,
}

/// Passed and failed.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    passed: u64,
    failed: u64,
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    Report::new("test").around(args.json.as_deref(), |report| {
        report.env.rustc = Toolchain::version_of_build_machine();
        let mut counts = Vec::new();
        let boots_only = args.emulator || args.matrix;
        if !boots_only && !args.threads {
            let mut command = Command::new("cargo");
            command.args(["test", "--workspace", "--no-fail-fast"]);
            counts.push(("unit", cargo_test(tree, args, "unit", command, report)?));
        }
        if !boots_only && !args.unit {
            let mut command = Command::new("cargo");
            under_shuttle(command.arg("test"));
            counts.push(("threads", cargo_test(tree, args, "threads", command, report)?));
        }
        if !args.unit && !args.threads {
            let toolchain = Toolchain::ensure(&Need::BOOTS)?;
            toolchain.note_versions(&mut report.env);
            let emulator = Emulator::get(tree, args.qemu)?;
            report.env.qemu = emulator.version();
            counts.push(("emulator", boots(tree, args, &toolchain, &emulator, report)?));
        }
        let failed: u64 = counts.iter().map(|(_, count)| count.failed).sum();
        let total: u64 = counts.iter().map(|(_, count)| count.passed).sum::<u64>() + failed;
        for step in report.steps.iter().flatten().filter(|step| !step.pass) {
            println!("FAILED {}", step.complaint());
        }
        ensure!(total > 0, "no test has that in its name");
        let text = |(layer, count): &(&str, Count)| {
            format!("{layer} {} passed, {} failed", count.passed, count.failed)
        };
        let counts: Vec<String> = counts.iter().map(text).collect();
        println!("{}: {}", if failed == 0 { "PASSED" } else { "FAILED" }, counts.join("; "));
        Ok(failed == 0)
    })
}

/// Runs the `cargo test` of a layer, showing what it prints.
fn cargo_test(
    tree: &Tree,
    args: &Args,
    layer: &str,
    mut command: Command,
    report: &mut Report,
) -> Result<Count> {
    command.current_dir(&tree.root).arg("--");
    command.args(&args.filter);
    if layer == "threads" {
        // What was tried is printed by the tests themselves.
        command.arg("--nocapture");
    }
    if args.verbose {
        eprintln!("{}", command_line(&command));
    }
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start cargo test")?;
    let mut text = String::new();
    for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
        let line = line?;
        println!("{line}");
        text += &line;
        text.push('\n');
    }
    let status = child.wait()?;
    let summary = Summary::parse(&text);
    let mut count = Count { passed: summary.passed, failed: summary.failed };
    let failed = summary.failed_tests.iter();
    report.add(failed.map(|name| Check::new(name, "the test passes", "it failed", false)));
    if !status.success() && count.failed == 0 {
        // A test program crashed, or something does not compile: cargo has said which.
        count.failed = 1;
        report.add([Check::new("cargo-test", "status 0", format!("{status}"), false)]);
    }
    let mut observed = format!("{} passed, {} failed", count.passed, count.failed);
    if let Some(tried) = Tried::parse(&text) {
        println!("{layer}: {tried}\n");
        observed += &format!("; {tried}");
    }
    report.add([Check::new(layer, "0 failed", observed, count.failed == 0)]);
    Ok(count)
}

/// Leaves out boots of Linux kernels that cannot be had, and says so.
pub(super) fn leave_out_missing_hosts(tree: &Tree, boots: &mut Vec<Boot>) {
    let missing = linux::missing(tree, boots.iter().filter_map(|boot| boot.scenario.needed_kernel()));
    for (kernel, why) in missing {
        let before = boots.len();
        boots.retain(|boot| boot.scenario.needed_kernel() != Some(kernel));
        println!(
            "\nskipped: {} boots of Linux ({kernel:?}), which cannot be had: {why}",
            before - boots.len()
        );
    }
}

/// Boots every scenario on every machine that it asks for.
fn boots(
    tree: &Tree,
    args: &Args,
    toolchain: &Toolchain,
    emulator: &Emulator,
    report: &mut Report,
) -> Result<Count> {
    let mut boots = Vec::new();
    for name in Scenario::names(tree)? {
        let scenario = Scenario::load(tree, &name)?;
        if !(args.release && scenario.test_calls) {
            boots.extend(boots_of(scenario, args.matrix, args.release));
        }
    }
    boots.retain(|boot| args.filter.as_ref().is_none_or(|filter| boot.label.contains(filter.as_str())));
    leave_out_missing_hosts(tree, &mut boots);
    let builder = Builder::new(tree, toolchain, args.release, args.verbose);
    let began = Instant::now();
    let jobs = match args.jobs {
        Some(jobs) => jobs.get(),
        None if args.verbose => 1,
        None => thread::available_parallelism().map_or(1, usize::from),
    };
    println!("\nrunning {} boots, {jobs} at a time where one CPU of this machine does for each", boots.len());
    let run = |boot: &&Boot| (boot.label.clone(), boot.run(tree, emulator, &builder, args));
    let (busy, small): (Vec<_>, Vec<_>) = boots.iter().partition(|boot| boot.scenario.is_busy());
    let mut outcomes = at_a_time(jobs, &small, run);
    outcomes.extend(busy.iter().map(run));
    let mut failed = Vec::new();
    for (label, outcome) in outcomes {
        if !outcome.pass() {
            failed.push(label.clone());
        }
        let named = |check: Check| Check { name: format!("{label}/{}", check.name), ..check };
        report.add(outcome.checks.into_iter().map(named));
    }
    if !failed.is_empty() {
        println!("\nfailures:");
        failed.iter().for_each(|label| println!("    qemu::{label}"));
    }
    let passed = boots.len() - failed.len();
    println!("\n{}\n", result_line(passed, failed.len(), began.elapsed()));
    Ok(Count { passed: passed as u64, failed: failed.len() as u64 })
}

/// Does something with each item, so many at a time; the results are in the order in which they came about.
fn at_a_time<T: Sync, R: Send>(jobs: usize, items: &[T], each: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs.min(items.len()) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = each(item);
                    // A worker that panics elsewhere ends the scope with its panic.
                    results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// One boot.
pub(super) struct Boot {
    pub(super) label: String,
    pub(super) scenario: Scenario,
    /// What differs of the machine.
    pub(super) by_hand: Overrides,
    pub(super) oracle: bool,
}

impl Boot {
    /// Boots, and prints what it showed.
    fn run(&self, tree: &Tree, emulator: &Emulator, builder: &Builder<'_>, args: &Args) -> Outcome {
        let Self { label, scenario, by_hand, oracle } = self;
        let options = Options {
            emulator: emulator.clone(),
            live: args.verbose,
            verbose: args.verbose,
            oracle: *oracle,
            // One control run a scenario is enough: it is about the search, not about the machine.
            control: *label == scenario.name,
            label: label.clone(),
            ..Options::default()
        };
        let outcome = boot::scenario(tree, builder, scenario, &scenario.machine(by_hand), &options)
            .unwrap_or_else(|error| Outcome::could_not_be_made(tree, &options, &error));
        let verdict = if outcome.pass() { "ok" } else { "FAILED" };
        let (checks, took) = (outcome.checks.len(), seconds(outcome.duration));
        let mut text = format!("test qemu::{label} ... {verdict} ({checks} checks, {took}");
        if let Some(random) = &outcome.console.random {
            // Told and not judged: other boots share the machine.
            text += &format!("; {} random calls, {} a second", random.calls, random.calls_per_second());
        }
        text += ")";
        for check in outcome.failures() {
            text += &format!("\n    {}", check.complaint());
        }
        if !outcome.pass() {
            text += &format!("\n    console: {}", tree.show(&outcome.log));
        }
        // In one piece: others print too.
        println!("{text}");
        outcome
    }
}

/// The boots of a scenario.
pub(super) fn boots_of(scenario: Scenario, matrix: bool, release: bool) -> Vec<Boot> {
    let machines = match scenario.matrix {
        _ if !matrix => scenario.also.clone(),
        None => Vec::new(),
        Some(Matrix::Memory) => {
            grid(MEMORIES.map(|memory| Overrides { memory: Some(memory.to_owned()), ..Overrides::default() }))
        }
        Some(Matrix::Cpus) => {
            // With one CPU nothing happens at the same time.
            let numbers = NUMBERS.into_iter().filter(|number| *number > 1 || !scenario.parallel);
            grid(numbers.map(|number| Overrides { smp: Some(number), ..Overrides::default() }))
        }
    };
    let name = &scenario.name;
    let boot =
        |label, by_hand: Overrides, oracle| Boot { label, scenario: scenario.clone(), by_hand, oracle };
    let mut boots = Vec::new();
    if !matrix {
        boots.push(boot(name.clone(), Overrides::default(), false));
        if scenario.oracle && !release {
            boots.push(boot(format!("{name}+oracle"), Overrides::default(), true));
        }
    }
    for by_hand in machines {
        boots.push(boot(format!("{name}@{}", scenario.machine(&by_hand)), by_hand, false));
    }
    boots
}

/// Each of these machines with each CPU model.
fn grid(machines: impl IntoIterator<Item = Overrides>) -> Vec<Overrides> {
    let with = |machine: &Overrides, cpu: &str| Overrides { cpu: Some(cpu.to_owned()), ..machine.clone() };
    machines.into_iter().flat_map(|machine| CPUS.map(|cpu| with(&machine, cpu))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(more: &str, matrix: bool) -> Vec<String> {
        let text = format!("description = \"d\"\nprogram = \"p\"\nsteps = [\"a\"]\n{more}");
        let scenario = Scenario::parse("s", &text).unwrap();
        boots_of(scenario, matrix, false).into_iter().map(|boot| boot.label).collect()
    }

    #[test]
    fn a_scenario_boots_on_its_own_machine_and_those_it_lists() {
        let also = "also = [{ memory = \"16G\", cpu = \"max\" }]";
        assert_eq!(labels(also, false), ["s", "s@16G,max,2"]);
        assert_eq!(labels(also, true), [] as [&str; 0]);
    }

    #[test]
    fn a_scenario_that_asks_for_it_boots_with_the_oracle_too_but_not_as_a_release() {
        assert_eq!(labels("oracle = true", false), ["s", "s+oracle"]);
        assert_eq!(labels("oracle = true", true), [] as [&str; 0]);
        let text = "description = \"d\"\nprogram = \"p\"\nsteps = [\"a\"]\noracle = true";
        assert_eq!(boots_of(Scenario::parse("s", text).unwrap(), false, true).len(), 1);
    }

    #[test]
    fn each_item_is_done_once_however_many_work() {
        for jobs in [1, 2, 7] {
            let mut squares = at_a_time(jobs, &[1, 2, 3, 4], |number| number * number);
            squares.sort();
            assert_eq!(squares, [1, 4, 9, 16]);
        }
        assert_eq!(at_a_time(3, &[], |number: &u8| *number), [] as [u8; 0]);
    }

    #[test]
    fn the_grid_has_every_memory_with_every_cpu() {
        let labels = labels("matrix = \"memory\"", true);
        assert_eq!(labels.len(), 15);
        assert!(labels.contains(&"s@513M,cortex-a76,2".to_owned()));
    }

    #[test]
    fn the_grid_has_every_number_of_cpus_but_one_where_several_are_the_point() {
        let several = labels("matrix = \"cpus\"", true);
        assert_eq!(several.len(), 12);
        assert!(several.contains(&"s@1G,max,1".to_owned()));
        let parallel = labels("matrix = \"cpus\"\nparallel = true", true);
        assert_eq!(parallel.len(), 9);
        assert!(!parallel.contains(&"s@1G,max,1".to_owned()));
    }
}
