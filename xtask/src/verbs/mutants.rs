//! `cargo xtask mutants`: seeds each fault of `tests/faults` into a copy of the sources and names what
//! catches it. A fault that nobody catches is a failure: of the tests.

use crate::boot::{self, Options};
use crate::images::Builder;
use crate::libtest::{Summary, result_line, under_shuttle};
use crate::linux;
use crate::patch::{Catcher, Layer, Patch};
use crate::report::{Fault, Report};
use crate::scenario::{Overrides, Scenario};
use crate::toolchain::{Need, Toolchain};
use crate::tree::Tree;
use crate::ui::{Task, command_line, seconds};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A test program that runs longer hangs, which is a way of noticing a fault.
const UNIT_TIMEOUT: Duration = Duration::from_secs(120);
/// The same where every pair of calls has its schedules.
const THREADS_TIMEOUT: Duration = Duration::from_secs(1200);

/// Packages whose tests play so many calls that they are worth being optimised.
const PLAYERS: [&str; 2] = ["deed-tests", "deed-fuzz"];

/// Seed the faults of tests/faults, one after the other, and name what catches each.
///
/// The faults go into a copy of the sources under target/mutants; the checkout is not touched.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only faults whose name contains this.
    filter: Option<String>,
    /// Only faults of this layer.
    #[arg(long, value_enum)]
    layer: Option<Layer>,
    /// Do not run the tests without a fault first: `cargo xtask test` has just passed.
    #[arg(long)]
    trust_tests: bool,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print command lines.
    #[arg(long, short)]
    verbose: bool,
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    Report::new("mutants").around(args.json.as_deref(), |report| {
        let faults = report.faults.insert(Vec::new());
        let mut patches = Patch::load_all(&tree.root.join("tests/faults"))?;
        patches.retain(|patch| args.layer.is_none_or(|layer| layer == patch.layer));
        patches
            .retain(|patch| args.filter.as_ref().is_none_or(|filter| patch.name.contains(filter.as_str())));
        ensure!(!patches.is_empty(), "there is no such fault in tests/faults");
        patches.sort_by_key(|patch| patch.layer);

        let boots = patches.iter().any(|patch| patch.layer.boots());
        report.env.rustc = Toolchain::version_of_build_machine();
        let toolchain = boots.then(|| Toolchain::ensure(&Need::BOOTS)).transpose()?;
        if let Some(toolchain) = &toolchain {
            toolchain.note_versions(&mut report.env);
        }
        leave_out_missing_hosts(tree, &mut patches)?;

        let began = Instant::now();
        println!("\nrunning {} faults", patches.len());
        let toolchain = toolchain.as_ref();
        let (booted, tested): (Vec<_>, Vec<_>) = patches.iter().partition(|patch| patch.layer.boots());
        let (mut busy, mut beside) = (Vec::new(), Vec::new());
        for patch in booted {
            if is_busy(tree, patch)? { busy.push(patch) } else { beside.push(patch) }
        }
        let boots = Lab::new(tree, "boots", toolchain, args.verbose)?;
        // What boots and what does not keep out of each other's way, so both go on at once. What needs CPUs that run at
        // the same time comes after: beside other work they would seldom meet.
        thread::scope(|scope| {
            let tested = scope
                .spawn(|| Lab::new(tree, "tests", None, args.verbose)?.try_faults(&tested, args.trust_tests));
            let beside = boots.try_faults(&beside, args.trust_tests)?;
            faults.extend(tested.join().unwrap_or_else(|panic| resume_unwind(panic))?);
            faults.extend(beside);
            anyhow::Ok(())
        })?;
        faults.extend(boots.try_faults(&busy, args.trust_tests)?);
        let missed = faults.iter().filter(|fault| fault.caught_by.is_empty()).count();
        println!("\n{}\n", result_line(patches.len() - missed, missed, began.elapsed()));
        let verdict = if missed == 0 { "PASSED" } else { "FAILED" };
        let bare = patches.iter().filter(|patch| patch.is_for_boots_alone()).count();
        if bare > 0 {
            println!("{bare} of them are in code that is built for the bare machine alone: only boots can catch those");
        }
        println!("{verdict}: {} of {} faults were caught", patches.len() - missed, patches.len());
        Ok(missed == 0)
    })
}

/// Where faults are tried: a copy of the sources with target folders of its own. (The checkout's own target
/// folder would not do: cargo could not tell the two copies apart.)
struct Lab<'a> {
    source: PathBuf,
    tree: Tree,
    toolchain: Option<&'a Toolchain>,
    verbose: bool,
}

impl<'a> Lab<'a> {
    fn new(tree: &Tree, name: &str, toolchain: Option<&'a Toolchain>, verbose: bool) -> Result<Self> {
        let folder = tree.target.join("mutants").join(name);
        let lab = Self {
            source: tree.root.clone(),
            tree: Tree { root: folder.join("tree"), target: folder.join("target") },
            toolchain,
            verbose,
        };
        lab.refresh()?;
        if toolchain.is_some() {
            linux::share(tree, &lab.tree)?;
            copy_builds(&tree.bare_metal_target(), &lab.tree.bare_metal_target())?;
        }
        Ok(lab)
    }

    /// Tries faults one after the other, and prints what came of each. Unless the tests are trusted, a fault whose test
    /// fails already is not caught.
    fn try_faults(&self, patches: &[&Patch], trust_tests: bool) -> Result<Vec<Fault>> {
        let unfit = if trust_tests { BTreeMap::new() } else { self.unfit_catchers(patches) };
        let mut faults = Vec::new();
        for patch in patches {
            let began = Instant::now();
            let caught = match patch.catchers.iter().find_map(|catcher| unfit.get(catcher)) {
                Some(why) => Err(anyhow!("its test cannot tell: {why}")),
                None => self.try_fault(patch),
            };
            let took = seconds(began.elapsed());
            let name = &patch.name;
            match &caught {
                Ok(caught) if caught.is_empty() => {
                    println!("test fault::{name} ... FAILED (not caught, {took})")
                }
                Ok(caught) => println!("test fault::{name} ... ok (caught by {}, {took})", caught.join(", ")),
                Err(error) => println!("test fault::{name} ... FAILED ({error:#})"),
            }
            faults.push(Fault { name: name.clone(), caught_by: caught.unwrap_or_default() });
        }
        Ok(faults)
    }

    /// Makes the copy equal to the checkout. Files that are equal already keep their times, so that cargo
    /// rebuilds only what has changed.
    fn refresh(&self) -> Result<()> {
        copy_folder(&self.source, &self.tree.root).context("cannot copy the sources")
    }

    /// Seeds a fault, runs the tests that must catch it, and returns which did.
    fn try_fault(&self, patch: &Patch) -> Result<Vec<String>> {
        let task = Task::begin(format!("{}: {}", patch.name, patch.fault));
        let caught = self.apply(patch).and_then(|()| self.catchers_of(patch));
        self.refresh()?;
        let is_caught = caught.as_ref().is_ok_and(|caught| !caught.is_empty());
        task.done(if is_caught { "caught" } else { "NOT caught" });
        caught
    }

    /// Who caught it; nobody, unless each that must has.
    fn catchers_of(&self, patch: &Patch) -> Result<Vec<String>> {
        let mut caught = Vec::new();
        for catcher in &patch.catchers {
            let by_this = self.run(catcher)?;
            ensure!(!by_this.is_empty(), "{catcher} does not notice it");
            caught.extend(by_this);
        }
        Ok(caught)
    }

    fn apply(&self, patch: &Patch) -> Result<()> {
        let mut command = Command::new("git");
        // The copy lies within the checkout's target folder: git must not take it for a part of that.
        let ceiling = self.tree.root.parent().context("no folder")?.canonicalize()?;
        command.env("GIT_CEILING_DIRECTORIES", ceiling).current_dir(&self.tree.root);
        command.args(["apply", "-C1"]).arg(&patch.path).stdin(Stdio::null());
        let output = command.output().context("cannot start git")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the patch does not apply: {}", complaint.trim());
        Ok(())
    }

    /// Runs every catcher without a fault, and returns why some are unfit: a test that fails already, or that
    /// does not exist, can catch nothing.
    fn unfit_catchers(&self, patches: &[&Patch]) -> BTreeMap<Catcher, String> {
        let task = Task::begin("the tests that must catch the faults, without a fault");
        let mut unfit = BTreeMap::new();
        let mut boots: BTreeMap<&str, Result<Vec<String>>> = BTreeMap::new();
        for catcher in patches.iter().flat_map(|patch| &patch.catchers).collect::<BTreeSet<_>>() {
            let why = match catcher {
                Catcher::Unit { .. } | Catcher::Threads { .. } => {
                    self.run(catcher).map(|failures| failures.join(", "))
                }
                Catcher::Oracle { scenario } => self.boot(scenario, true, false).map(|outcome| {
                    outcome.failures().map(|check| check.name.as_str()).collect::<Vec<_>>().join(", ")
                }),
                Catcher::Emulator { scenario, .. } => {
                    let boot = boots.entry(scenario).or_insert_with(|| self.run_boot(scenario, None));
                    let named = |failure: &&String| failure.starts_with(&catcher.to_string());
                    let named =
                        |failures: &Vec<String>| failures.iter().filter(named).cloned().collect::<Vec<_>>();
                    boot.as_ref()
                        .map(|failures| named(failures).join(", "))
                        .map_err(|error| anyhow!("{error:#}"))
                }
            };
            match why {
                Ok(failures) if failures.is_empty() => {}
                Ok(failures) => drop(unfit.insert(catcher.clone(), format!("{failures} without a fault"))),
                Err(error) => drop(unfit.insert(catcher.clone(), format!("{error:#}"))),
            }
        }
        task.done(&format!("{} unfit", unfit.len()));
        unfit
    }

    /// Runs the tests that a catcher names; returns those that failed.
    fn run(&self, catcher: &Catcher) -> Result<Vec<String>> {
        match catcher {
            Catcher::Unit { package, test } => {
                let mut command = Command::new("cargo");
                command.args(["test", "--package", package]);
                if !PLAYERS.contains(&package.as_str()) {
                    // Quick to build, with a part of the package at a time.
                    command.arg("--config").arg(format!("profile.test.package.{package}.opt-level=0"));
                }
                self.run_tests("unit", package, test, command, UNIT_TIMEOUT)
            }
            Catcher::Threads { test } => {
                let mut command = Command::new("cargo");
                under_shuttle(command.arg("test"));
                self.run_tests("threads", "deed-tests", test, command, THREADS_TIMEOUT)
            }
            Catcher::Emulator { scenario, step } => self.run_boot(scenario, step.as_deref()),
            Catcher::Oracle { scenario } => self.run_oracle(scenario),
        }
    }

    fn run_tests(
        &self,
        layer: &str,
        package: &str,
        test: &str,
        command: Command,
        timeout: Duration,
    ) -> Result<Vec<String>> {
        let mut failures = Vec::new();
        let mut ran = false;
        for (folder, program) in self.build_tests(package, command)? {
            let (text, is_over) = self.run_test_program(&folder, &program, test, timeout)?;
            let summary = Summary::parse(&text);
            ran |= summary.is_cut_short || summary.passed + summary.failed > 0;
            failures.extend(summary.failed_tests.iter().map(|name| format!("{layer}/{package}::{name}")));
            if summary.is_cut_short && summary.failed_tests.is_empty() {
                let why = if is_over { "crashed" } else { "hung" };
                failures.push(format!("{layer}/{package}::{test} ({why})"));
            }
        }
        ensure!(ran, "{package} has no test with `{test}` in its name");
        Ok(failures)
    }

    /// Builds a package's tests as `cargo test` would; returns for each program the folder to run it in and its path.
    fn build_tests(&self, package: &str, mut command: Command) -> Result<Vec<(PathBuf, PathBuf)>> {
        command.current_dir(&self.tree.root).args(["--quiet", "--no-run"]);
        command.args(["--message-format=json-render-diagnostics", "--target-dir"]).arg(&self.tree.target);
        if self.verbose {
            eprintln!("{}", command_line(&command));
        }
        let output =
            command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot start cargo")?;
        if !output.status.success() {
            bail!("the tests of {package} do not build: a fault must be one that the compiler lets through");
        }
        let mut programs = Vec::new();
        for line in String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.starts_with('{')) {
            let message: serde_json::Value = serde_json::from_str(line)?;
            let field =
                |path: &str| message.pointer(path).and_then(serde_json::Value::as_str).map(PathBuf::from);
            let is_test = message.pointer("/profile/test") == Some(&serde_json::Value::Bool(true));
            if let (Some(program), Some(manifest), true) =
                (field("/executable"), field("/manifest_path"), is_test)
            {
                programs.push((manifest.parent().context("no folder")?.to_path_buf(), program));
            }
        }
        Ok(programs)
    }

    /// Runs one test program; returns what it printed and whether it ended by itself.
    fn run_test_program(
        &self,
        folder: &Path,
        program: &Path,
        test: &str,
        timeout: Duration,
    ) -> Result<(String, bool)> {
        let log = self.tree.target.join("test.log");
        let mut command = Command::new(program);
        command.current_dir(folder).arg(test).stdin(Stdio::null());
        let file = fs::File::create(&log)?;
        let mut child =
            command.stdout(file.try_clone()?).stderr(file).spawn().context("cannot start a test")?;
        let deadline = Instant::now() + timeout;
        let mut is_over = false;
        while !is_over && Instant::now() < deadline {
            is_over = child.try_wait()?.is_some();
            thread::sleep(Duration::from_millis(5));
        }
        if !is_over {
            // It may have ended meanwhile: `wait` tells.
            let _ = child.kill();
            child.wait()?;
        }
        Ok((String::from_utf8_lossy(&fs::read(&log)?).into_owned(), is_over))
    }

    fn run_boot(&self, name: &str, step: Option<&str>) -> Result<Vec<String>> {
        let outcome = self.boot(name, false, step.is_none())?;
        // A named step must be the one that fails; a boot that breaks before it comes to it has it missing.
        let named = outcome.failures().filter(|check| step.is_none_or(|step| check.name == step));
        let names: BTreeSet<String> = named.map(|check| format!("emulator/{name}/{}", check.name)).collect();
        Ok(names.into_iter().collect())
    }

    /// Boots with the oracle. Only what the oracle itself says counts.
    fn run_oracle(&self, name: &str) -> Result<Vec<String>> {
        let outcome = self.boot(name, true, false)?;
        let found = outcome.failures().any(crate::oracle::is_report);
        Ok(found.then(|| format!("oracle/{name}")).into_iter().collect())
    }

    fn boot(&self, name: &str, oracle: bool, until_a_step_fails: bool) -> Result<boot::Outcome> {
        let toolchain = self.toolchain.context("no compiler for boots")?;
        let scenario = Scenario::load(&self.tree, name)?;
        let builder = Builder::new(&self.tree, toolchain, false, self.verbose);
        let (verbose, label) = (self.verbose, name.to_owned());
        let options = Options { verbose, oracle, until_a_step_fails, label, ..Options::default() };
        let machine = scenario.machine(&Overrides::default());
        boot::scenario(&self.tree, &builder, &scenario, &machine, &options)
    }
}

/// Leaves out faults that only Linux shows, where that cannot be had, and says so.
fn leave_out_missing_hosts(tree: &Tree, patches: &mut Vec<Patch>) -> Result<()> {
    let mut kernels = Vec::new();
    for patch in &*patches {
        kernels.push(kernel_for(tree, patch)?);
    }
    let missing = linux::missing(tree, kernels.iter().copied().flatten());
    let mut kernels = kernels.into_iter();
    patches.retain(|patch| {
        let why = kernels.next().flatten().and_then(|kernel| missing.get(&kernel));
        if let Some(why) = why {
            println!("skipped: {} needs Linux, which cannot be had: {why}", patch.name);
        }
        why.is_none()
    });
    Ok(())
}

/// Whether a boot that shows the fault keeps more than one CPU of the build machine busy.
fn is_busy(tree: &Tree, patch: &Patch) -> Result<bool> {
    for catcher in &patch.catchers {
        if let Catcher::Emulator { scenario, .. } | Catcher::Oracle { scenario } = catcher
            && Scenario::load(tree, scenario)?.is_busy()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The kernel without which a fault cannot be shown.
fn kernel_for(tree: &Tree, patch: &Patch) -> Result<Option<linux::Kernel>> {
    for catcher in &patch.catchers {
        if let Catcher::Emulator { scenario, .. } = catcher
            && let Some(kernel) = Scenario::load(tree, scenario)?.needed_kernel()
        {
            return Ok(Some(kernel));
        }
    }
    Ok(None)
}

/// Makes `to` equal to `from`, but for version control and build results.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let is_left_out = |name: &std::ffi::OsStr| name == "target" || name == ".git";
    let mut present = BTreeSet::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if is_left_out(&name) {
            continue;
        }
        let (source, copy) = (entry.path(), to.join(&name));
        if entry.file_type()?.is_dir() {
            copy_folder(&source, &copy)?;
        } else if fs::read(&copy).ok() != Some(fs::read(&source)?) {
            fs::copy(&source, &copy)?;
        }
        present.insert(name);
    }
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if !present.contains(&entry.file_name()) {
            let path = entry.path();
            if entry.file_type()?.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
    }
    Ok(())
}

/// Copies a target folder of cargo's, if there is one to copy and nothing at its place yet. In it the crates that are
/// not of this workspace, `core` among them, are built already.
fn copy_builds(from: &Path, to: &Path) -> Result<()> {
    if !from.exists() || to.exists() {
        return Ok(());
    }
    fs::create_dir_all(to.parent().context("no folder")?)?;
    // Cargo goes by the times of files, which the copies keep.
    let mut command = Command::new("cp");
    command.arg("--archive").args([from, to]);
    let copied = command.stdin(Stdio::null()).status().context("cannot start cp")?;
    ensure!(copied.success(), "cannot copy {}", from.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_becomes_equal_and_equal_files_are_left_alone() {
        let folder = std::env::temp_dir().join(format!("deed-copy-{}", std::process::id()));
        let (from, to) = (folder.join("from"), folder.join("to"));
        fs::create_dir_all(from.join("a/target")).unwrap();
        fs::write(from.join("a/same"), "1").unwrap();
        fs::write(from.join("a/changed"), "1").unwrap();
        copy_folder(&from, &to).unwrap();
        let time = fs::metadata(to.join("a/same")).unwrap().modified().unwrap();

        fs::write(to.join("a/changed"), "fault").unwrap();
        fs::write(to.join("a/new"), "fault").unwrap();
        copy_folder(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("a/changed")).unwrap(), b"1");
        assert!(!to.join("a/new").exists() && !to.join("a/target").exists());
        assert_eq!(fs::metadata(to.join("a/same")).unwrap().modified().unwrap(), time);
        fs::remove_dir_all(folder).unwrap();
    }
}
