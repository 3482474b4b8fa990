//! `cargo xtask bench`: counts the instructions of every operation and holds them against pKVM's.

use crate::boot::{self, Options};
use crate::budget::{self, Allowance};
use crate::console::{Console, Counted};
use crate::elf;
use crate::images::Builder;
use crate::report::{Check, Environment, Report, Row, Rows};
use crate::scenario::{Machine, Overrides, Scenario};
use crate::toolchain::{Need, Toolchain};
use crate::tree::Tree;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// Where the boots are described.
const FOLDER: &str = "qemu/bench";
/// The operation that every boot counts.
const BOOT: &str = "EL2 initialisation";

/// Count guest instructions of each operation, and compare with pKVM's figures and Deed's budgets.
///
/// Boots release images on an emulator that counts instructions (qemu/bench), checks that it does, and prints a
/// row for each operation. Fails if a row is above pKVM's own figure, or missing; a row above its budget is
/// marked.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show only operations with this in their name.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print command lines and consoles.
    #[arg(long, short)]
    verbose: bool,
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    Report::new("bench").around(args.json.as_deref(), |report| {
        report.env.rustc = Toolchain::version_of_build_machine();
        let mut counted = Vec::new();
        let done = boots(tree, args, report, &mut counted);
        // What was counted before something went wrong is told all the same.
        let rows = rows(&counted, args.filter.as_deref());
        report.rows = Some(Rows::Counted(rows.clone()));
        done?;
        report.add(judge(&counted));
        ensure!(!rows.is_empty() || args.filter.is_none(), "no operation has that in its name");
        print(&rows);
        let failed = || report.steps.iter().flatten().filter(|check| !check.pass);
        failed().for_each(|check| println!("FAIL {}", check.complaint()));
        let pass = failed().next().is_none();
        let over = rows.iter().filter(|row| row.budget.is_some_and(|budget| row.min > budget)).count();
        let verdict = if pass { "PASSED" } else { "FAILED" };
        let above = rows.iter().filter(|row| row.peer.is_some_and(|peer| row.min > peer)).count();
        println!("{verdict}: {} rows, {over} above their budget, {above} above pKVM", rows.len());
        Ok(pass)
    })
}

/// Boots everything in the folder, and counts.
fn boots(tree: &Tree, args: &Args, report: &mut Report, counted: &mut Vec<Counted>) -> Result<()> {
    let load = |name: &String| Scenario::load_from(tree, FOLDER, name);
    let scenarios = Scenario::names_in(tree, FOLDER)?.iter().map(load).collect::<Result<Vec<_>>>()?;
    let machines: Vec<Machine> =
        scenarios.iter().map(|scenario| scenario.machine(&Overrides::default())).collect();
    // Rows are named after whole GiB.
    let odd = machines.iter().find(|machine| !machine.memory.ends_with('G'));
    ensure!(odd.is_none(), "qemu/bench has a machine whose memory is not in GiB: {odd:?}");
    note_machines(&mut report.env, &machines);
    let toolchain = Toolchain::ensure(&[Need::Build, Need::Qemu])?;
    toolchain.note_versions(&mut report.env);
    let builder = Builder::new(tree, &toolchain, true, args.verbose);
    let mut image = None;
    for (scenario, machine) in scenarios.iter().zip(&machines) {
        let name = &scenario.name;
        ensure!(scenario.counted, "{FOLDER}/{name}.toml counts nothing");
        let options = Options {
            live: args.verbose,
            verbose: args.verbose,
            label: format!("bench-{name}"),
            ..Options::default()
        };
        let outcome = boot::scenario(tree, &builder, scenario, machine, &options)?;
        counted.extend(rows_of(&outcome.console, &machine.memory));
        let named = |check: Check| Check { name: format!("{name}: {}", check.name), ..check };
        report.add(outcome.checks.into_iter().map(named));
        image = Some(outcome.hyp_elf);
    }
    counted.push(code(&image.context("there is nothing in qemu/bench")?)?);
    Ok(())
}

/// Says where it is counted: CPU models of all boots, and the number of CPUs if each has the same.
fn note_machines(environment: &mut Environment, machines: &[Machine]) {
    let mut models: Vec<&str> = machines.iter().map(|machine| machine.cpu.as_str()).collect();
    models.sort_unstable();
    models.dedup();
    environment.cpu = Some(models.join(", "));
    let mut numbers = machines.iter().map(|machine| machine.smp);
    environment.smp = numbers.next().filter(|first| numbers.all(|number| number == *first));
}

/// The rows of a boot. What the boot itself cost is named after the machine, and what EL2 keeps stands beside it,
/// if the hypervisor came as far as to say so: a row that is missing fails.
fn rows_of(console: &Console, memory: &str) -> Vec<Counted> {
    let gib = memory.trim_end_matches('G');
    let mut rows = console.rows.clone();
    if let Some(row) = rows.iter_mut().find(|row| row.operation == BOOT) {
        row.operation = format!("{BOOT}, {gib} GiB");
        let kept = kept(console);
        rows.extend(
            kept.map(|bytes| once(format!("memory kept for the hypervisor, {gib} GiB, bytes"), bytes)),
        );
    }
    rows
}

/// Bytes of RAM that the hypervisor says are its own.
fn kept(console: &Console) -> Option<u64> {
    let image = console.facts("image ")?;
    let fact = |key| u64::from_str_radix(image.get(key)?.strip_prefix("0x")?, 16).ok();
    fact("end")?.checked_sub(fact("base")?)
}

/// The rows of the report, in the order of the allowances: those with this in their name.
fn rows(counted: &[Counted], filter: Option<&str>) -> Vec<Row> {
    let mut rows: Vec<Row> = counted.iter().filter_map(row).collect();
    rows.retain(|row| filter.is_none_or(|filter| row.operation.contains(filter)));
    rows.sort_by_key(|row| allowances().position(|allowance| allowance.operation == row.operation));
    rows
}

/// What is read off the hypervisor's ELF file.
fn code(elf: &Path) -> Result<Counted> {
    let symbols = elf::symbols(&std::fs::read(elf)?)?;
    let symbol = |name: &str| symbols.get(name).copied().with_context(|| format!("the image has no {name}"));
    Ok(once("EL2 code, bytes".into(), symbol("__text_used")? - symbol("__text_start")?))
}

fn once(operation: String, bytes: u64) -> Counted {
    Counted { operation, min: bytes, sum: bytes, runs: 1 }
}

fn allowances() -> impl Iterator<Item = &'static Allowance> {
    budget::ALLOWANCES.iter()
}

fn row(counted: &Counted) -> Option<Row> {
    let allowance = allowances().find(|allowance| allowance.operation == counted.operation)?;
    Some(Row {
        operation: counted.operation.clone(),
        min: counted.min,
        mean: counted.sum as f64 / counted.runs as f64,
        runs: counted.runs,
        budget: allowance.budget,
        peer: allowance.peer,
        floor: allowance.floor,
    })
}

/// Each operation is counted once, no other is, and none costs more than in pKVM.
fn judge(counted: &[Counted]) -> Vec<Check> {
    let mut checks = Vec::new();
    for allowance in allowances() {
        let name = allowance.operation;
        let seen: Vec<&Counted> = counted.iter().filter(|row| row.operation == name).collect();
        let [row] = seen[..] else {
            checks.push(Check::new(name, "counted once", format!("{} rows", seen.len()), false));
            continue;
        };
        let Some(peer) = allowance.peer else { continue };
        let expected = format!("at most {peer}, as in pKVM");
        checks.push(Check::new(name, expected, row.min.to_string(), row.min <= peer));
    }
    let known = |row: &&Counted| !allowances().any(|allowance| allowance.operation == row.operation);
    checks.extend(
        counted
            .iter()
            .filter(known)
            .map(|row| Check::new(&row.operation, "a known operation", "unknown", false)),
    );
    checks
}

fn print(rows: &[Row]) {
    let number = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    let width = rows.iter().map(|row| row.operation.len()).max().unwrap_or(0);
    println!(
        "\n{:width$} {:>9} {:>11} {:>6} {:>8} {:>9} {:>11}",
        "operation", "min", "mean", "runs", "budget", "pKVM", ""
    );
    for row in rows {
        let (budget, peer) = (number(row.budget), number(row.peer));
        let mark = match (row.budget, row.peer) {
            (_, Some(peer)) if row.min > peer => "ABOVE pKVM",
            (Some(budget), _) if row.min > budget => "over budget",
            _ => "",
        };
        println!(
            "{:width$} {:>9} {:>11.1} {:>6} {budget:>8} {peer:>9} {mark:>11}",
            row.operation, row.min, row.mean, row.runs
        );
    }
    println!();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_at(min: impl Fn(&Allowance) -> u64) -> Vec<Counted> {
        allowances()
            .map(|allowance| {
                let min = min(allowance);
                Counted { operation: allowance.operation.into(), min, sum: min, runs: 1 }
            })
            .collect()
    }

    fn complaints(counted: &[Counted]) -> Vec<String> {
        judge(counted).into_iter().filter(|check| !check.pass).map(|check| check.complaint()).collect()
    }

    fn peer(allowance: &Allowance) -> u64 {
        allowance.peer.unwrap_or(u64::MAX)
    }

    #[test]
    fn a_row_at_pkvms_figure_passes_and_one_above_it_fails() {
        let good = all_at(peer);
        assert_eq!(complaints(&good), [] as [&str; 0]);
        let mut bad = good.clone();
        bad[0].min += 1;
        let complaint = "host call with an unknown id: expected at most 85, as in pKVM, observed 86";
        assert_eq!(complaints(&bad), [complaint]);
    }

    #[test]
    fn a_row_that_is_missing_doubled_or_unknown_fails() {
        let mut rows = all_at(peer);
        let mut first = rows.remove(0);
        assert_eq!(complaints(&rows).len(), 1);
        rows.push(first.clone());
        rows.push(first.clone());
        assert_eq!(
            complaints(&rows),
            ["host call with an unknown id: expected counted once, observed 2 rows"]
        );
        rows.pop();
        first.operation = "levitate".into();
        rows.push(first);
        assert_eq!(complaints(&rows), ["levitate: expected a known operation, observed unknown"]);
    }

    #[test]
    fn what_a_boot_costs_is_named_after_its_machine() {
        const ROWS: &str = "ROW EL2 initialisation | 9 | 9 | 1\nROW x | 1 | 3 | 3\n";
        let operations = |text: &str| {
            let rows = rows_of(&Console::parse(text), "16G");
            rows.iter().map(|row| format!("{} {}", row.operation, row.min)).collect::<Vec<_>>()
        };
        let all = operations(&format!("[deed] image base=0x40200000 end=0x40300000\n{ROWS}"));
        let kept = "memory kept for the hypervisor, 16 GiB, bytes 1048576";
        assert_eq!(all, ["EL2 initialisation, 16 GiB 9", "x 1", kept]);
    }

    #[test]
    fn a_boot_that_broke_off_keeps_the_rows_that_it_printed() {
        let console = Console::parse("ROW x | 1 | 3 | 3\n[deed] PANIC here\n");
        assert_eq!(rows_of(&console, "1G").len(), 1);
        let without_image = Console::parse("ROW EL2 initialisation | 9 | 9 | 1\n");
        assert_eq!(rows_of(&without_image, "1G").len(), 1);
    }

    #[test]
    fn the_report_names_all_cpu_models_and_a_number_that_all_share() {
        let machine = |cpu: &str, smp| Machine { memory: "1G".into(), cpu: cpu.into(), smp };
        let noted = |machines: &[Machine]| {
            let mut environment = Environment::default();
            note_machines(&mut environment, machines);
            (environment.cpu.unwrap(), environment.smp)
        };
        let machines = [machine("max", 1), machine("cortex-a76", 1), machine("max", 1)];
        assert_eq!(noted(&machines), ("cortex-a76, max".to_owned(), Some(1)));
        assert_eq!(noted(&[machine("max", 1), machine("max", 2)]), ("max".to_owned(), None));
    }
}
