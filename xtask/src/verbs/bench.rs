//! `cargo xtask bench`: counts the instructions of every operation and holds them against pKVM's.

use crate::boot::{self, Options, Outcome};
use crate::budget::{self, Allowance};
use crate::console::Counted;
use crate::elf;
use crate::images::Builder;
use crate::report::{Check, Report, Row, Rows};
use crate::scenario::{Overrides, Scenario};
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
        let toolchain = Toolchain::ensure(&[Need::Build, Need::Qemu])?;
        report.env = toolchain.environment();
        let builder = Builder::new(tree, &toolchain, true, args.verbose);
        let mut checks = Vec::new();
        let mut counted = Vec::new();
        let mut image = None;
        for name in Scenario::names_in(tree, FOLDER)? {
            let scenario = Scenario::load_from(tree, FOLDER, &name)?;
            ensure!(scenario.counted, "{FOLDER}/{name}.toml counts nothing");
            let machine = scenario.machine(&Overrides::default());
            let options = Options {
                live: args.verbose,
                verbose: args.verbose,
                label: format!("bench-{name}"),
                ..Options::default()
            };
            let outcome = boot::scenario(tree, &builder, &scenario, &machine, &options)?;
            counted.extend(rows_of(&outcome, &machine.memory)?);
            image = Some(outcome.hyp_elf);
            checks.extend(
                outcome
                    .checks
                    .into_iter()
                    .map(|check| Check { name: format!("{name}: {}", check.name), ..check }),
            );
        }
        counted.push(code(&image.context("there is nothing in qemu/bench")?)?);
        checks.extend(judge(&counted));
        let mut rows: Vec<Row> = counted.iter().filter_map(row).collect();
        rows.sort_by_key(|row| allowances().position(|allowance| allowance.operation == row.operation));
        let shown = |name: &str| args.filter.as_deref().is_none_or(|filter| name.contains(filter));
        let rows: Vec<Row> = rows.into_iter().filter(|row| shown(&row.operation)).collect();
        ensure!(!rows.is_empty() || args.filter.is_none(), "no operation has that in its name");
        print(&rows);
        checks.iter().filter(|check| !check.pass).for_each(|check| println!("FAIL {}", check.complaint()));
        let pass = checks.iter().all(|check| check.pass);
        let over = rows.iter().filter(|row| row.budget.is_some_and(|budget| row.min > budget)).count();
        let verdict = if pass { "PASSED" } else { "FAILED" };
        let above = rows.iter().filter(|row| row.peer.is_some_and(|peer| row.min > peer)).count();
        println!("{verdict}: {} rows, {over} above their budget, {above} above pKVM", rows.len());
        report.steps = Some(checks);
        report.rows = Some(Rows::Counted(rows));
        Ok(pass)
    })
}

/// The rows of a boot. What the boot itself cost is named after the machine.
fn rows_of(outcome: &Outcome, memory: &str) -> Result<Vec<Counted>> {
    let gib = memory.strip_suffix('G').context("the machines here have whole GiB")?;
    let mut rows = outcome.console.rows.clone();
    if let Some(row) = rows.iter_mut().find(|row| row.operation == BOOT) {
        row.operation = format!("{BOOT}, {gib} GiB");
        let image = outcome.console.facts("image ").context("the hypervisor did not say where it is")?;
        let fact =
            |key| image.get(key).and_then(|text| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok());
        let kept = fact("end").zip(fact("base")).context("the hypervisor's place cannot be read")?;
        rows.push(once(format!("memory kept for the hypervisor, {gib} GiB, bytes"), kept.0 - kept.1));
    }
    Ok(rows)
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
}
