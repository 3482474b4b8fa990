//! Lines and branches of the core, as the tests of the build machine run them.
//!
//! The compiler counts (`-C instrument-coverage`); LLVM's tools merge the counts and tell them in lcov's format. Code
//! that serves tests alone does not count, neither as run nor as missed.

use crate::libtest::Summary;
use crate::report::{Check, Covered};
use crate::toolchain::ProfileTools;
use crate::tree::Tree;
use crate::ui::{Task, command_line};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const LINES_TARGET: u64 = 95;
const BRANCHES_TARGET: u64 = 85;

/// What is measured.
const FOLDERS: [&str; 3] = ["hyp/src/", "spec/src/", "abi/src/"];
/// Files and folders in them that serve tests alone: what the tests of the crate stand on, and the explorer of the
/// specification, which `cargo xtask model` runs.
const OF_TESTS: [&str; 9] = [
    "hyp/src/testing",
    "hyp/src/vm/testing.rs",
    "hyp/src/sync/order.rs",
    "hyp/src/boot/sample.rs",
    "hyp/src/oracle/tests.rs",
    "spec/src/explore.rs",
    "spec/src/names.rs",
    "spec/src/worlds.rs",
    "spec/src/tests.rs",
];
/// Left out because counting makes them many times slower, for lines that others run too.
const SLOW: [&str; 1] = ["every_call_in_every_state_of_a_small_world"];
/// Sequences of random calls, where the tests have a number of them.
const SEQUENCES: &str = "100";

/// How often each line and each branch of a file was run.
#[derive(Debug, Default, PartialEq, Eq)]
struct File {
    lines: BTreeMap<usize, u64>,
    /// The line of each branch, and how often it was taken.
    branches: Vec<(usize, u64)>,
}

impl File {
    fn covered_lines(&self) -> Covered {
        let covered = self.lines.values().filter(|count| **count > 0).count();
        Covered::new("lines", covered, self.lines.len())
    }

    fn covered_branches(&self) -> Covered {
        let covered = self.branches.iter().filter(|(_, count)| *count > 0).count();
        Covered::new("branches", covered, self.branches.len())
    }

    /// Lines that nothing ran, and lines of which a branch was never taken.
    fn missed(&self) -> (Vec<usize>, Vec<usize>) {
        let lines = self.lines.iter().filter(|(_, count)| **count == 0).map(|(line, _)| *line);
        let run = |line: &usize| self.lines.get(line).is_none_or(|count| *count > 0);
        let branches = self.branches.iter().filter(|(_, count)| *count == 0).map(|(line, _)| *line);
        let mut branches: Vec<usize> = branches.filter(run).collect();
        branches.dedup();
        (lines.collect(), branches)
    }
}

/// Runs the tests; returns whether they passed, and what they covered: the totals, which have a target, and each file.
pub(super) fn measure(tree: &Tree, verbose: bool) -> Result<(Vec<Check>, Vec<Covered>)> {
    let tools = ProfileTools::ensure()?;
    let folder = tree.target.join("coverage");
    let profiles = folder.join("profiles");
    let programs = build(tree, &folder, verbose)?;
    // Build scripts have been counted too.
    if profiles.exists() {
        fs::remove_dir_all(&profiles)?;
    }
    let checks = run_tests(tree, &folder, verbose)?;

    let task = Task::begin("reading the counts");
    let counts = folder.join("counts.profdata");
    let mut merge = Command::new(&tools.profdata);
    merge.args(["merge", "--sparse", "--output"]).arg(&counts).arg(&profiles);
    output(&mut merge, verbose)?;
    let mut export = Command::new(&tools.cov);
    export.args(["export", "--format=lcov", "--instr-profile"]).arg(&counts);
    for program in &programs {
        export.arg("--object").arg(program);
    }
    let files = read(&tree.root, &output(&mut export, verbose)?)?;
    task.done(&format!("{} files", files.len()));
    ensure!(!files.is_empty(), "nothing of {} was counted", FOLDERS.join(", "));
    Ok((checks, rows(&files, verbose)))
}

/// The command that builds or runs the tests.
fn cargo_test(tree: &Tree, folder: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(&tree.root);
    // Branches are counted by an unstable switch, which this one build may use.
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env("RUSTFLAGS", "-C instrument-coverage -Z coverage-options=branch");
    command.env("LLVM_PROFILE_FILE", folder.join("profiles/%p-%m.profraw"));
    command.args(["test", "--target-dir"]).arg(folder);
    for package in ["hyp", "spec", "abi", "deed-tests"] {
        command.args(["--package", package]);
    }
    command
}

/// Builds the tests; returns their programs.
fn build(tree: &Tree, folder: &Path, verbose: bool) -> Result<Vec<PathBuf>> {
    let task = Task::begin("building tests that count");
    let mut command = cargo_test(tree, folder);
    command.args(["--quiet", "--no-run", "--message-format=json-render-diagnostics"]);
    let text = output(&mut command, verbose)?;
    let mut programs = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let program = message.pointer("/executable").and_then(serde_json::Value::as_str);
        programs.extend(program.map(PathBuf::from));
    }
    task.done(&format!("{} programs", programs.len()));
    Ok(programs)
}

/// Runs the tests: a check for all, and one for each that failed.
fn run_tests(tree: &Tree, folder: &Path, verbose: bool) -> Result<Vec<Check>> {
    let task = Task::begin("tests of the build machine");
    let mut command = cargo_test(tree, folder);
    command.env("DEED_SEQUENCES", SEQUENCES).args(["--no-fail-fast", "--"]);
    for name in SLOW {
        command.args(["--skip", name]);
    }
    // What a test prints when it fails is in its own run: `cargo xtask test --unit NAME`.
    command.stderr(Stdio::null());
    let (text, success) = run(&mut command, verbose)?;
    let summary = Summary::parse(&text);
    let observed = format!("{} passed, {} failed", summary.passed, summary.failed);
    task.done(&observed);
    let failed = summary.failed_tests.iter();
    let failed = failed.map(|name| Check::new(name, "the test passes", "it failed", false));
    Ok(std::iter::once(Check::new("unit", "0 failed", observed, success)).chain(failed).collect())
}

/// What a command prints. Its complaints go to the terminal.
fn output(command: &mut Command, verbose: bool) -> Result<String> {
    let (text, success) = run(command.stderr(Stdio::inherit()), verbose)?;
    ensure!(success, "{} failed", command.get_program().to_string_lossy());
    Ok(text)
}

/// What a command prints, and whether it succeeded.
fn run(command: &mut Command, verbose: bool) -> Result<(String, bool)> {
    if verbose {
        eprintln!("{}", command_line(command));
    }
    let output = command.stdin(Stdio::null()).output();
    let output =
        output.with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    Ok((String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success()))
}

/// Reads lcov's format, without code that serves tests alone. Files are named from `root` on.
fn read(root: &Path, text: &str) -> Result<BTreeMap<String, File>> {
    let mut files = BTreeMap::new();
    for record in text.split("end_of_record") {
        let Some(path) = record.lines().find_map(|line| line.strip_prefix("SF:")) else { continue };
        let name = Path::new(path).strip_prefix(root).ok().and_then(Path::to_str);
        let Some(name) = name.filter(|name| is_measured(name)) else { continue };
        let source = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        let file =
            File::read(record, &lines_of_tests(&source)).with_context(|| format!("counts of {name}"))?;
        files.insert(name.to_owned(), file);
    }
    Ok(files)
}

fn is_measured(name: &str) -> bool {
    FOLDERS.iter().any(|folder| name.starts_with(folder))
        && !OF_TESTS.iter().any(|part| name.starts_with(part))
}

impl File {
    /// Reads a record: `DA:line,count` for a line, `BRDA:line,block,branch,count` for a branch, where the count
    /// of a branch whose condition was never reached is `-`.
    fn read(record: &str, of_tests: &[bool]) -> Result<Self> {
        let is_of_tests = |line: usize| of_tests.get(line.wrapping_sub(1)) == Some(&true);
        let mut file = Self::default();
        for entry in record.lines() {
            let Some((kind, fields)) = entry.split_once(':') else { continue };
            let fields: Vec<&str> = fields.split(',').collect();
            match (kind, fields.as_slice()) {
                ("DA", [line, count, ..]) => {
                    file.lines.insert(line.parse()?, count.parse()?);
                }
                ("BRDA", [line, _, _, count]) => {
                    let count = if *count == "-" { 0 } else { count.parse()? };
                    file.branches.push((line.parse()?, count));
                }
                _ => {}
            }
        }
        file.lines.retain(|line, _| !is_of_tests(*line));
        file.branches.retain(|(line, _)| !is_of_tests(*line));
        Ok(file)
    }
}

/// For each line of a source whether it is of an item, or a statement, that only builds for tests have: it stands
/// behind `#[cfg(test)]` or `#[cfg(any(test, ...))]`, and ends as rustfmt ends it: with its first line, or with a
/// brace below that line's beginning.
fn lines_of_tests(source: &str) -> Vec<bool> {
    let mut found = Vec::new();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let is_attribute = |line: &str| line.trim_start().starts_with("#[");
        let text = line.trim_start();
        let is_cfg = text.starts_with("#[cfg(test)]") || text.starts_with("#[cfg(any(test,");
        found.push(is_cfg);
        if !is_cfg {
            continue;
        }
        let indent = line.len() - text.len();
        let mut began = false;
        for line in lines.by_ref() {
            found.push(true);
            let ends_at_once = !began && !is_attribute(line) && line.ends_with([';', ',', '}']);
            began |= !is_attribute(line);
            let is_last = line.len() == indent + 1 && line.ends_with('}');
            if ends_at_once || is_last {
                break;
            }
        }
    }
    found
}

fn rows(files: &BTreeMap<String, File>, verbose: bool) -> Vec<Covered> {
    let width = files.keys().map(String::len).max().unwrap_or(0);
    println!("\n{:width$} {:>11} {:>7} {:>11} {:>7}", "file", "lines", "", "branches", "");
    let mut rows = Vec::new();
    let mut totals = [("lines", LINES_TARGET), ("branches", BRANCHES_TARGET)]
        .map(|(what, target)| Covered::new(what, 0, 0).against(target));
    for (name, file) in files {
        let both = [file.covered_lines(), file.covered_branches()];
        let [lines, branches] = both.each_ref().map(|row| match row.total {
            0 => format!("{:>11} {:>7}", "-", ""),
            total => format!("{:>11} {:>5.1} %", format!("{}/{total}", row.covered), row.percent),
        });
        println!("{name:width$} {lines} {branches}");
        if verbose {
            tell_missed(file);
        }
        for (total, row) in totals.iter_mut().zip(&both) {
            total.add(row);
        }
        rows.extend(both.map(|row| row.of_file(name)).into_iter().filter(|row| row.total > 0));
    }
    println!();
    totals.into_iter().chain(rows).collect()
}

fn tell_missed(file: &File) {
    let (lines, branches) = file.missed();
    for (what, numbers) in [("lines that nothing ran", lines), ("lines with a branch never taken", branches)]
    {
        if !numbers.is_empty() {
            let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
            println!("    {what}: {}", numbers.join(" "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_branches_are_read_without_those_of_tests() {
        let record =
            "SF:/d/a.rs\nFN:1,f\nDA:1,7\nDA:2,0\nDA:3,1\nBRDA:2,0,0,4\nBRDA:2,0,1,0\nBRDA:3,1,0,-\nLF:3\n";
        let file = File::read(record, &[false, false, true]).unwrap();
        assert_eq!(file.lines, BTreeMap::from([(1, 7), (2, 0)]));
        assert_eq!(file.branches, [(2, 4), (2, 0)]);
        assert_eq!(file.covered_lines(), Covered::new("lines", 1, 2));
        assert_eq!(file.covered_branches(), Covered::new("branches", 1, 2));
        assert_eq!(File::read(record, &[]).unwrap().missed(), (vec![2], vec![3]));
        assert!(File::read("DA:1,x\n", &[]).is_err());
    }

    #[test]
    fn items_and_statements_of_tests_are_found_and_nothing_else() {
        let source = "\
fn a() {
    #[cfg(any(test, feature = \"sim\"))]
    if x {
        y();
    }
    z();
    #[cfg(test)]
    let held = 1;
    b(Self {
        #[cfg(any(test, feature = \"sim\"))]
        held,
        w,
    });
}
#[cfg(test)]
#[expect(dead_code)]
pub fn f(
    a: u64,
) {
}
#[cfg(test)]
mod sample;
#[cfg(not(test))]
fn g() {}
#[cfg(test)]
mod tests {
    fn h() {
    }
}
";
        let of_tests = lines_of_tests(source);
        let others: Vec<&str> =
            source.lines().zip(&of_tests).filter(|(_, is)| !**is).map(|(line, _)| line.trim()).collect();
        let expected = ["fn a() {", "z();", "b(Self {", "w,", "});", "}", "#[cfg(not(test))]", "fn g() {}"];
        assert_eq!(others, expected);
    }

    #[test]
    fn the_files_that_serve_tests_alone_are_there_and_left_out() {
        let root = Tree::of_this_checkout().unwrap().root;
        for part in OF_TESTS {
            assert!(!is_measured(part));
            assert!(root.join(part).exists() || root.join(format!("{part}.rs")).exists(), "{part}");
        }
        assert!(is_measured("hyp/src/sync.rs") && !is_measured("sim/src/ram.rs"));
    }

    #[test]
    fn tests_that_are_skipped_exist() {
        let root = Tree::of_this_checkout().unwrap().root;
        let text = fs::read_to_string(root.join("tests/tests/every_state.rs")).unwrap();
        assert!(SLOW.iter().all(|name| text.contains(name)));
    }
}
