//! Rust's test runner: how the tests whose schedule shuttle decides are built, and what the runner prints: which
//! tests failed, and its own summary.

use std::fmt;
use std::process::Command;
use std::str::FromStr;

/// Asks cargo for the build in which locks and atomics are shuttle's. Nothing else turns it on, so no ordinary test
/// runs under it by chance; its profile keeps its results apart.
pub(crate) fn under_shuttle(cargo: &mut Command) -> &mut Command {
    cargo.env("RUSTFLAGS", "--cfg deed_shuttle");
    cargo.args(["--profile", "threads", "--package", "deed-tests", "--test", "threads"])
}

/// A run of one or more test programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Names of the tests that failed.
    pub(crate) failed_tests: Vec<String>,
    /// Numbers of the `test result:` lines, added up.
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// A test program that began and did not come to its summary: it crashed, or was ended.
    pub(crate) is_cut_short: bool,
}

impl Summary {
    /// Reads the output of `cargo test`.
    pub(crate) fn parse(text: &str) -> Self {
        let mut summary = Self::default();
        for line in text.lines() {
            if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
                summary.is_cut_short = true;
            } else if let Some(result) = line.strip_prefix("test result: ") {
                summary.is_cut_short = false;
                summary.passed += number_before(result, " passed");
                summary.failed += number_before(result, " failed");
            } else if let Some(name) =
                line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
            {
                summary.failed_tests.push(name.trim_end_matches(" - should panic").to_owned());
            }
        }
        summary
    }
}

fn number_before(text: &str, word: &str) -> u64 {
    text.split(word).next().and_then(last_number).unwrap_or(0)
}

fn last_number<T: FromStr>(text: &str) -> Option<T> {
    text.rsplit(' ').next()?.parse().ok()
}

/// What the tests under shuttle have tried, all starts together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tried {
    starts: u64,
    pairs: u64,
    schedules: u64,
    /// Of all starts, added up: several are played at the same time.
    seconds: f64,
}

impl Tried {
    /// Reads what each start has printed: `NAME: P pairs, S schedules each, in T s`. `None` if none has.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut tried = Self::default();
        for (pairs, schedules, seconds) in text.lines().filter_map(start).filter(|(pairs, ..)| *pairs > 0) {
            tried.starts += 1;
            tried.pairs += pairs;
            tried.schedules += pairs * schedules;
            tried.seconds += seconds;
        }
        (tried.starts > 0).then_some(tried)
    }
}

/// Pairs, schedules of each, and seconds of one start. The runner may have begun the line.
fn start(line: &str) -> Option<(u64, u64, f64)> {
    let (tried, took) = line.split_once(" schedules each, in ")?;
    let (pairs, schedules) = tried.split_once(" pairs, ")?;
    Some((last_number(pairs)?, schedules.parse().ok()?, took.trim_end().strip_suffix(" s")?.parse().ok()?))
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { starts, pairs, schedules, seconds } = self;
        write!(f, "{starts} starts, {pairs} pairs, {schedules} schedules, {seconds:.1} s added up")
    }
}

/// The summary line of this command's own tests, in the same form.
pub(crate) fn result_line(passed: usize, failed: usize, elapsed: std::time::Duration) -> String {
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    format!(
        "test result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; \
         finished in {:.2}s",
        elapsed.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "running 2 tests\n\
        test a::b ... ok\n\
        test a::c ... FAILED\n\
        test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.01s\n\
        running 1 test\n\
        test d - should panic ... ok\n\
        test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";

    #[test]
    fn summaries_of_several_programs_are_added_up() {
        let summary = Summary::parse(TEXT);
        assert_eq!((summary.passed, summary.failed, summary.is_cut_short), (2, 1, false));
        assert_eq!(summary.failed_tests, ["a::c"]);
    }

    #[test]
    fn a_program_without_a_summary_was_cut_short() {
        assert!(Summary::parse(&format!("{TEXT}running 4 tests\ntest x ... ")).is_cut_short);
    }

    #[test]
    fn what_all_starts_have_tried_is_added_up() {
        let text = "test two_calls ... the-hosts: 12 pairs, 200 schedules each, in 1.5 s\n\
            pinned: 3 pairs, 200 schedules each, in 0.7 s\n\
            private: 0 pairs, 200 schedules each, in 0.0 s\n\
            test result: ok. 2 passed; 0 failed; finished in 2.00s\n";
        let tried = Tried::parse(text).unwrap();
        assert_eq!(tried.to_string(), "2 starts, 15 pairs, 3000 schedules, 2.2 s added up");
        assert_eq!(Tried::parse(TEXT), None);
    }

    #[test]
    fn the_own_summary_line_reads_like_the_runners() {
        let line = result_line(3, 1, std::time::Duration::from_millis(1500));
        assert_eq!((Summary::parse(&line).passed, Summary::parse(&line).failed), (3, 1));
    }
}
