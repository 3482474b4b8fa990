//! What a run showed: for people on the terminal, for machines as JSON.

use crate::scenario::Machine;
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) expected: String,
    pub(crate) observed: String,
    pub(crate) pass: bool,
}

impl Check {
    /// A check with its outcome.
    pub(crate) fn new(
        name: &str,
        expected: impl Into<String>,
        observed: impl Into<String>,
        pass: bool,
    ) -> Self {
        Self { name: name.to_owned(), expected: expected.into(), observed: observed.into(), pass }
    }

    /// A failed check, in one line.
    pub(crate) fn complaint(&self) -> String {
        format!("{}: expected {}, observed {}", self.name, self.expected, self.observed)
    }
}

/// A seeded fault and what caught it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Fault {
    pub(crate) name: String,
    pub(crate) caught_by: Vec<String>,
}

/// What one target of `fuzz` did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Fuzzed {
    pub(crate) target: &'static str,
    pub(crate) seed: u64,
    #[serde(flatten)]
    pub(crate) played: Played,
}

/// How much that was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Played {
    /// In QEMU.
    Programs {
        programs: u64,
        calls: u64,
        /// Pairs of a call and an outcome that were seen.
        pairs: u64,
        calls_per_second: u64,
    },
    /// On the build machine.
    Inputs {
        executions: u64,
        executions_per_second: u64,
        /// Where an input is several steps.
        #[serde(skip_serializing_if = "Option::is_none")]
        steps_per_second: Option<u64>,
    },
}

/// An operation, counted in guest instructions, beside what it may cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) operation: String,
    pub(crate) min: u64,
    pub(crate) mean: f64,
    pub(crate) runs: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) budget: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) floor: Option<&'static str>,
}

/// How much of something was run: of everything, or of one file or function.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Covered {
    pub(crate) what: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) function: Option<String>,
    pub(crate) covered: u64,
    pub(crate) total: u64,
    /// Rounded down to one digit behind the point.
    pub(crate) percent: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<u64>,
}

impl Covered {
    /// So many of so many.
    pub(crate) fn new(what: &'static str, covered: usize, total: usize) -> Self {
        let (covered, total) = (covered as u64, total as u64);
        Self {
            what,
            file: None,
            function: None,
            covered,
            total,
            percent: percent(covered, total),
            target: None,
        }
    }

    /// The same, of one file.
    pub(crate) fn of_file(self, name: &str) -> Self {
        Self { file: Some(name.to_owned()), ..self }
    }

    /// The same, of one function.
    pub(crate) fn of_function(self, name: &str) -> Self {
        Self { function: Some(name.to_owned()), ..self }
    }

    /// The same, with so many percent to reach.
    pub(crate) fn against(self, target: u64) -> Self {
        Self { target: Some(target), ..self }
    }

    /// Adds what was run of another part.
    pub(crate) fn add(&mut self, part: &Self) {
        self.covered += part.covered;
        self.total += part.total;
        self.percent = percent(self.covered, self.total);
    }

    /// Whether the target is reached, where there is one.
    pub(crate) fn is_enough(&self) -> bool {
        self.target.is_none_or(|target| self.covered * 100 >= target * self.total)
    }
}

fn percent(covered: u64, total: u64) -> f64 {
    (covered * 1000).checked_div(total).unwrap_or(0) as f64 / 10.0
}

/// The rows of a report.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(crate) enum Rows {
    /// Of `bench`.
    Counted(Vec<Row>),
    /// Of `coverage`.
    Covered(Vec<Covered>),
}

/// Versions and machine of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Environment {
    pub(crate) rustc: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) qemu: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) smp: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<String>,
}

impl Environment {
    /// Says which machine boots.
    pub(crate) fn note_machine(&mut self, machine: &Machine) {
        self.cpu = Some(machine.cpu.clone());
        self.smp = Some(machine.smp);
        self.memory = Some(machine.memory.clone());
    }
}

/// The file that `--json` writes.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Version of this form.
    deed: u32,
    verb: &'static str,
    pub(crate) pass: bool,
    pub(crate) env: Environment,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) steps: Option<Vec<Check>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) faults: Option<Vec<Fault>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fuzzed: Option<Vec<Fuzzed>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) distinct_states: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) depth: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rows: Option<Rows>,
}

impl Report {
    /// An empty report, which says "failed" until told otherwise.
    pub(crate) fn new(verb: &'static str) -> Self {
        Self {
            deed: 1,
            verb,
            pass: false,
            env: Environment::default(),
            steps: None,
            faults: None,
            fuzzed: None,
            distinct_states: None,
            depth: None,
            rows: None,
        }
    }

    /// Results, which are written from now on whatever follows.
    pub(crate) fn add(&mut self, checks: impl IntoIterator<Item = Check>) {
        self.steps.get_or_insert_default().extend(checks);
    }

    /// Runs `work` and writes the report to `path`, if there is one, whether the work succeeded, failed or
    /// could not be done. Returns whether all passed.
    pub(crate) fn around(
        mut self,
        path: Option<&Path>,
        work: impl FnOnce(&mut Self) -> Result<bool>,
    ) -> Result<bool> {
        let done = work(&mut self);
        self.pass = matches!(done, Ok(true));
        if let Err(error) = &done {
            let check = Check::new(self.verb, "the run can be made", format!("{error:#}"), false);
            self.add([check]);
        }
        if let Some(path) = path {
            let text = serde_json::to_string_pretty(&self)? + "\n";
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(work: impl FnOnce(&mut Report) -> Result<bool>) -> serde_json::Value {
        let name = format!("deed-report-{}-{:?}.json", std::process::id(), std::thread::current().id());
        let path = std::env::temp_dir().join(name);
        let _ = Report::new("qemu").around(Some(&path), work);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn the_file_has_the_documented_form_and_what_does_not_apply_is_absent() {
        let json = written(|report| {
            report.env.smp = Some(2);
            report.steps = Some(vec![Check::new("a", "1", "1", true)]);
            Ok(true)
        });
        let expected = serde_json::json!({
            "deed": 1, "verb": "qemu", "pass": true, "env": {"rustc": "", "smp": 2},
            "steps": [{"name": "a", "expected": "1", "observed": "1", "pass": true}],
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn what_was_covered_is_rounded_down_and_judged_exactly() {
        let mut lines = Covered::new("lines", 900, 1000).against(95);
        assert!(!lines.is_enough());
        lines.add(&Covered::new("lines", 1849, 1895));
        assert_eq!((lines.covered, lines.total, lines.percent), (2749, 2895, 94.9));
        assert!(!lines.is_enough());
        assert!(Covered::new("lines", 95, 100).against(95).is_enough());
        let json =
            serde_json::to_value(Rows::Covered(vec![Covered::new("lines", 1, 8).of_file("a.rs")])).unwrap();
        let expected =
            serde_json::json!([{"what": "lines", "file": "a.rs", "covered": 1, "total": 8, "percent": 12.5}]);
        assert_eq!(json, expected);
    }

    #[test]
    fn what_was_seen_before_a_run_broke_off_is_written_too() {
        let json = written(|report| {
            report.env.note_machine(&Machine { memory: "1G".into(), cpu: "max".into(), smp: 2 });
            report.add([Check::new("a", "1", "1", true)]);
            report.add([Check::new("b", "1", "2", false)]);
            anyhow::bail!("no emulator")
        });
        assert_eq!(json["env"], serde_json::json!({"rustc": "", "cpu": "max", "smp": 2, "memory": "1G"}));
        let names: Vec<_> = json["steps"].as_array().unwrap().iter().map(|step| &step["name"]).collect();
        assert_eq!(names, ["a", "b", "qemu"]);
    }

    #[test]
    fn each_target_has_the_counts_of_its_kind() {
        let inputs = |steps_per_second| Fuzzed {
            target: "calls",
            seed: 1,
            played: Played::Inputs { executions: 90, executions_per_second: 30, steps_per_second },
        };
        let programs = Played::Programs { programs: 2, calls: 200, pairs: 9, calls_per_second: 50 };
        let emulator = Fuzzed { target: "emulator", seed: 7, played: programs };
        let json = serde_json::to_value([inputs(Some(600)), inputs(None), emulator]).unwrap();
        let expected = serde_json::json!([
            {"target": "calls", "seed": 1, "executions": 90, "executions_per_second": 30, "steps_per_second": 600},
            {"target": "calls", "seed": 1, "executions": 90, "executions_per_second": 30},
            {"target": "emulator", "seed": 7, "programs": 2, "calls": 200, "pairs": 9, "calls_per_second": 50},
        ]);
        assert_eq!(json, expected);
    }

    #[test]
    fn a_run_that_could_not_be_made_is_written_too() {
        let json = written(|_| anyhow::bail!("no compiler"));
        assert_eq!(json["pass"], false);
        assert_eq!(json["steps"][0]["observed"], "no compiler");
    }
}
