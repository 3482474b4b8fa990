//! What a run showed: for people on the terminal, for machines as JSON.

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
    pub(crate) programs: u64,
    pub(crate) calls: u64,
    /// Pairs of a call and an outcome that were seen.
    pub(crate) pairs: u64,
    pub(crate) calls_per_second: u64,
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
    pub(crate) rows: Option<Vec<Row>>,
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
            self.steps.get_or_insert_default().push(check);
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
    fn a_run_that_could_not_be_made_is_written_too() {
        let json = written(|_| anyhow::bail!("no compiler"));
        assert_eq!(json["pass"], false);
        assert_eq!(json["steps"][0]["observed"], "no compiler");
    }
}
