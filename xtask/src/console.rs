//! What a console says, and whether that is a pass. `qemu/README.md` has the rules in words.
//!
//! Host and hypervisor share one UART, so nothing on it is believed but a verdict with this run's nonce, and
//! facts of the hypervisor are taken from their first line, which is printed before the host runs.

use crate::report::Check;
use crate::scenario::Stop;
use std::collections::{BTreeMap, HashMap};

const DEED: &str = "[deed] ";
const PANIC: &str = "PANIC";
const VERDICT: &str = "verdict ";

/// A console, taken apart.
#[derive(Debug, Default)]
pub(crate) struct Console {
    /// `STEP` lines in their order.
    pub(crate) steps: Vec<Check>,
    /// `ROW` lines.
    pub(crate) rows: Vec<Counted>,
    /// The `FUZZ` line.
    pub(crate) random: Option<Random>,
    /// `STEP`, `ROW` and `DONE` lines that are not well formed or say that something failed.
    complaints: Vec<String>,
    /// `[deed] ` lines, from behind that: a host that has begun a line hides nothing of EL2's.
    deed: Vec<String>,
}

/// A `ROW` line: instructions of one operation, counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) operation: String,
    /// Of the cheapest run.
    pub(crate) min: u64,
    /// Of all runs.
    pub(crate) sum: u64,
    pub(crate) runs: u64,
}

/// A `FUZZ` line: random calls that a program has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Random {
    pub(crate) seed: u64,
    pub(crate) programs: u64,
    pub(crate) calls: u64,
    /// Pairs of a call and an outcome that were seen.
    pub(crate) pairs: u64,
    /// By the machine's clock, without its boot.
    nanoseconds: u64,
}

impl Random {
    /// How many calls were made in a second of the machine's clock, which is that of the world unless instructions
    /// are counted.
    pub(crate) fn calls_per_second(&self) -> u64 {
        self.calls.saturating_mul(1_000_000_000) / self.nanoseconds.max(1)
    }
}

/// How QEMU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By itself, with this status.
    Status(i32),
    /// By a signal that this command did not send.
    Signal,
    /// It was ended after so many seconds.
    Timeout(u64),
    /// It was ended because it printed without end.
    Flood,
}

/// What must be seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expectation<'a> {
    /// This run's nonce.
    pub(crate) nonce: u64,
    /// Lists of steps; the order counts within each.
    pub(crate) steps: &'a [Vec<&'a str>],
    /// Fields that the verdict must have, beside the nonce.
    pub(crate) verdict: &'a BTreeMap<String, toml::Value>,
    /// The boot must stop so, and there must be no verdict.
    pub(crate) stop: Option<&'a Stop>,
}

impl Console {
    /// Whether a step has failed.
    pub(crate) fn has_failed_step(&self) -> bool {
        self.steps.iter().any(|step| !step.pass)
    }

    /// Takes a console apart.
    pub(crate) fn parse(text: &str) -> Self {
        let mut console = Self::default();
        for line in text.lines().map(|line| line.trim_end_matches('\r')) {
            if let Some((_, line)) = line.split_once(DEED) {
                console.deed.push(line.to_owned());
            } else if line.split(' ').next() == Some("STEP") {
                match parse_step(line) {
                    Some(step) => console.steps.push(step),
                    None => console.complaints.push(line.to_owned()),
                }
            } else if let Some(rest) = line.strip_prefix("ROW ") {
                match parse_row(rest) {
                    Some(row) => console.rows.push(row),
                    None => console.complaints.push(line.to_owned()),
                }
            } else if let Some(rest) = line.strip_prefix("FUZZ ") {
                console.random = console.random.or_else(|| parse_random(rest));
            } else if let Some(rest) = line.strip_prefix("DONE ")
                && !rest.ends_with(" 0 failed")
            {
                console.complaints.push(line.to_owned());
            }
        }
        console
    }

    /// Returns the `key=value` words of the first `[deed] ` line that begins with `start`.
    pub(crate) fn facts(&self, start: &str) -> Option<HashMap<&str, &str>> {
        self.deed.iter().find_map(|line| line.strip_prefix(start)).map(words)
    }

    /// Checks everything that a scenario asks of its console.
    pub(crate) fn judge(&self, expectation: &Expectation<'_>, ending: Ending) -> Vec<Check> {
        let mut checks = self.judge_steps(expectation.steps);
        match expectation.stop {
            Some(stop) => checks.extend(self.judge_stop(stop)),
            None => checks.push(self.judge_verdict(expectation)),
        }
        checks
            .extend(self.judge_health(expectation.stop.is_some_and(|stop| stop.message.starts_with(PANIC))));
        checks.push(judge_ending(ending));
        checks
    }

    /// Checks what even a control run must show: the hypervisor lived to its end.
    pub(crate) fn judge_end(
        &self,
        nonce: u64,
        verdict: &BTreeMap<String, toml::Value>,
        ending: Ending,
    ) -> Vec<Check> {
        // Counts of pages may differ in a control run; the reason may not.
        let reason = verdict.iter().filter(|(name, _)| *name == "reason");
        let verdict = reason.map(|(name, value)| (name.clone(), value.clone())).collect();
        let expectation = Expectation { nonce, steps: &[], verdict: &verdict, stop: None };
        let mut checks = vec![self.judge_verdict(&expectation)];
        checks.extend(self.judge_panic());
        checks.push(judge_ending(ending));
        checks
    }

    fn judge_steps(&self, expected: &[Vec<&str>]) -> Vec<Check> {
        let mut checks = self.steps.clone();
        for list in expected {
            let mut last = None;
            for name in list {
                let seen: Vec<usize> =
                    (0..self.steps.len()).filter(|&index| self.steps[index].name == *name).collect();
                match seen[..] {
                    [] => checks.push(Check::new(name, "the step is seen", "not seen", false)),
                    [at] if last.is_some_and(|last| at < last) => {
                        checks.push(Check::new(name, "the listed order", "seen too early", false));
                    }
                    [at] => last = Some(at),
                    // Said below, for steps that are not listed too.
                    _ => {}
                }
            }
        }
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for step in &self.steps {
            *counts.entry(&step.name).or_default() += 1;
        }
        let twice = counts.into_iter().filter(|(_, count)| *count > 1);
        checks
            .extend(twice.map(|(name, n)| {
                Check::new(name, "the step is seen once", format!("seen {n} times"), false)
            }));
        checks
    }

    fn judge_verdict(&self, expectation: &Expectation<'_>) -> Check {
        let mut expected = format!("nonce={:016x}", expectation.nonce);
        let reason = toml::Value::from("off");
        let mut fields: Vec<(&str, &toml::Value)> = vec![("reason", &reason)];
        fields.retain(|(name, _)| !expectation.verdict.contains_key(*name));
        fields.extend(expectation.verdict.iter().map(|(name, value)| (name.as_str(), value)));
        for (name, value) in &fields {
            expected += &format!(" {name}={}", plain(value));
        }
        let verdicts: Vec<&str> = self.deed.iter().filter_map(|line| line.strip_prefix(VERDICT)).collect();
        let observed = match verdicts.len() {
            0 => "no verdict".to_owned(),
            _ => verdicts.join(" and "),
        };
        let is_right = |verdict: &str| {
            let words = words(verdict);
            let nonce = words.get("nonce").and_then(|nonce| u64::from_str_radix(nonce, 16).ok());
            nonce == Some(expectation.nonce)
                && fields.iter().all(|(name, value)| words.get(name).copied() == Some(plain(value).as_str()))
        };
        let pass = matches!(verdicts[..], [verdict] if is_right(verdict));
        Check::new("verdict", expected, observed, pass)
    }

    fn judge_stop(&self, stop: &Stop) -> Vec<Check> {
        let seen = |text: &String| {
            let line = self.deed.iter().find(|line| line.contains(text));
            let observed = line.or(self.deed.last()).map_or("nothing", String::as_str);
            Check::new("stop", format!("`{text}`"), observed, line.is_some())
        };
        let mut checks: Vec<Check> = std::iter::once(&stop.message).chain(&stop.also).map(seen).collect();
        let panics = self.deed.iter().filter(|line| line.starts_with(PANIC)).count();
        if panics > 1 {
            checks.push(Check::new("stop", "one PANIC line", format!("{panics}"), false));
        }
        if let Some(verdict) = self.deed.iter().find(|line| line.starts_with(VERDICT)) {
            checks.push(Check::new("stop", "no verdict", verdict, false));
        }
        checks
    }

    fn judge_health(&self, panic_is_expected: bool) -> Vec<Check> {
        let mut checks = Vec::new();
        if !panic_is_expected {
            checks.extend(self.judge_panic());
        }
        checks
            .extend(self.complaints.iter().map(|line| Check::new("program", "a passing line", line, false)));
        checks
    }

    fn judge_panic(&self) -> Option<Check> {
        let panic = self.deed.iter().find(|line| line.starts_with(PANIC))?;
        Some(Check::new("panic", "no PANIC line", panic, false))
    }
}

fn judge_ending(ending: Ending) -> Check {
    let observed = match ending {
        Ending::Status(status) => format!("status {status}"),
        Ending::Signal => "ended by a signal".to_owned(),
        Ending::Timeout(seconds) => format!("still running after {seconds} s"),
        Ending::Flood => "printed without end".to_owned(),
    };
    Check::new("exit", "QEMU ends by itself with status 0", observed, ending == Ending::Status(0))
}

/// `STEP name | expected | observed | pass`; a bar within `observed` stays there.
fn parse_step(line: &str) -> Option<Check> {
    let rest = line.strip_prefix("STEP ")?;
    let (rest, outcome) = rest.rsplit_once(" | ")?;
    let pass = match outcome.trim_end() {
        "pass" => true,
        "fail" => false,
        _ => return None,
    };
    let mut parts = rest.splitn(3, " | ").map(str::trim);
    let (name, expected, observed) = (parts.next()?, parts.next()?, parts.next()?);
    let is_name =
        !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    is_name.then(|| Check::new(name, expected, observed, pass))
}

/// `operation | min | sum | runs`
fn parse_row(rest: &str) -> Option<Counted> {
    let mut parts = rest.trim_end().split(" | ");
    let operation = parts.next()?.to_owned();
    let mut number = || parts.next()?.parse().ok();
    let row = Counted { operation, min: number()?, sum: number()?, runs: number()? };
    (parts.next().is_none() && row.runs > 0 && !row.operation.is_empty()).then_some(row)
}

fn parse_random(rest: &str) -> Option<Random> {
    let words = words(rest);
    let number = |name| words.get(name)?.parse().ok();
    Some(Random {
        seed: number("seed")?,
        programs: number("programs")?,
        calls: number("calls")?,
        pairs: number("pairs")?,
        nanoseconds: number("nanoseconds")?,
    })
}

fn words(line: &str) -> HashMap<&str, &str> {
    line.split_ascii_whitespace().filter_map(|word| word.split_once('=')).collect()
}

/// A TOML value as it stands in a verdict line: text without its quotes.
fn plain(value: &toml::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[deed] image base=0x40200000 end=0x40400000\r\n\
        [host] up\r\n\
        STEP a | 1 | 1 | pass\r\n\
        some prose\r\n\
        STEP b | x | y | z | pass\r\n\
        DONE 2 passed, 0 failed\r\n\
        [deed] verdict nonce=00000000000000ab reason=off aborts=0 host=9 hyp=3 guest=0\r\n";

    fn judge_with(text: &str, verdict: &str, ending: Ending) -> Vec<String> {
        let verdict = toml::from_str(verdict).unwrap();
        let steps = [vec!["a", "b"]];
        let expectation = Expectation { nonce: 0xab, steps: &steps, verdict: &verdict, stop: None };
        let checks = Console::parse(text).judge(&expectation, ending);
        checks.into_iter().filter(|check| !check.pass).map(|check| check.complaint()).collect()
    }

    fn judge(text: &str) -> Vec<String> {
        judge_with(text, "", Ending::Status(0))
    }

    fn assert_complaint(complaints: &[String], name: &str, text: &str) {
        let hit = complaints.iter().any(|line| line.starts_with(name) && line.contains(text));
        assert!(hit, "{name}, {text}: {complaints:?}");
    }

    #[test]
    fn a_good_console_passes() {
        assert_eq!(judge(GOOD), [] as [&str; 0]);
        assert_eq!(judge_with(GOOD, "guest = 0\nreason = \"off\"", Ending::Status(0)), [] as [&str; 0]);
    }

    #[test]
    fn random_calls_are_counted_in_seconds_of_the_machine() {
        let line = "FUZZ seed=2 programs=3 calls=400 aborts=5 pairs=6 nanoseconds=200000000\r\n";
        let random = Console::parse(&format!("{GOOD}{line}")).random.unwrap();
        assert_eq!((random.seed, random.programs, random.calls, random.pairs), (2, 3, 400, 6));
        assert_eq!(random.calls_per_second(), 2000);
        assert_eq!(Random { nanoseconds: 0, ..random }.calls_per_second(), 400_000_000_000);
        assert_eq!(Console::parse("FUZZ seed=2\n").random, None);
    }

    #[test]
    fn no_verdict_a_second_one_and_a_wrong_nonce_are_failures() {
        let without = GOOD.replace("[deed] verdict", "[host] verdict");
        assert_complaint(&judge(&without), "verdict", "no verdict");
        let line = GOOD.lines().last().unwrap();
        assert_complaint(&judge(&format!("{GOOD}{line}\n")), "verdict", " and ");
        let forged = line.replace("ab", "ac");
        assert_complaint(&judge(&format!("{forged}\n{GOOD}")), "verdict", "ac");
        assert_complaint(&judge(&GOOD.replace("00ab", "00ac")), "verdict", "00ac");
        assert_complaint(&judge(&GOOD.replace("nonce=00000000000000ab ", "")), "verdict", "");
    }

    #[test]
    fn a_verdict_behind_a_line_that_the_host_began_counts_too() {
        let begun = GOOD.replace("[deed] verdict", "host[deed] verdict");
        assert_eq!(judge(&begun), [""; 0]);
        // As a CPU of the host could that hears its own UART, and does not end the machine.
        let line = GOOD.lines().last().unwrap();
        assert_complaint(&judge(&format!("{begun}{line}\n")), "verdict", " and ");
    }

    #[test]
    fn a_verdict_with_another_field_than_asked_is_a_failure() {
        assert_complaint(&judge_with(GOOD, "reason = \"reset\"", Ending::Status(0)), "verdict", "reason=off");
        assert_complaint(&judge_with(GOOD, "aborts = 1", Ending::Status(0)), "verdict", "aborts=0");
        assert_complaint(&judge(&GOOD.replace("reason=off", "reason=reset")), "verdict", "reset");
    }

    #[test]
    fn a_panic_line_is_a_failure() {
        assert_complaint(&judge(&format!("[deed] PANIC at the disco\n{GOOD}")), "panic", "disco");
    }

    #[test]
    fn a_missing_a_failed_a_repeated_and_a_misplaced_step_are_failures() {
        assert_complaint(&judge(&GOOD.replace("STEP a", "step a")), "a", "not seen");
        assert_complaint(&judge(&GOOD.replace("1 | pass", "2 | fail")), "a", "observed 2");
        assert_complaint(&judge(&format!("STEP a | 1 | 1 | pass\n{GOOD}")), "a", "seen 2 times");
        assert_complaint(&judge(&format!("STEP c | 1 | 2 | fail\n{GOOD}")), "c", "observed 2");
        let b = "STEP b | x | y | z | pass\r\n";
        assert_complaint(&judge(&format!("{b}{}", GOOD.replace(b, ""))), "b", "too early");
    }

    #[test]
    fn a_torn_step_and_a_bad_total_are_failures() {
        assert_complaint(&judge(&format!("STEP d | 1 | 1\n{GOOD}")), "program", "STEP d");
        assert_complaint(&judge(&format!("STEP d | 1 | 1 | maybe\n{GOOD}")), "program", "maybe");
        assert_complaint(&judge(&GOOD.replace("0 failed", "1 failed")), "program", "1 failed");
    }

    #[test]
    fn rows_are_read_and_a_torn_one_is_a_failure() {
        let row = "ROW host share hyp, one page | 180 | 1805 | 10\n";
        let rows = Console::parse(&format!("{GOOD}{row}")).rows;
        let operation = "host share hyp, one page".to_owned();
        assert_eq!(rows, [Counted { operation, min: 180, sum: 1805, runs: 10 }]);
        for torn in [&row[..40], "ROW a | 1 | 1 | 0\n", "ROW a | 1 | -1 | 1\n", "ROW a | 1 | 1 | 1 | 1\n"] {
            assert_complaint(&judge(&format!("{torn}\n{GOOD}")), "program", "ROW");
        }
    }

    #[test]
    fn any_ending_but_status_0_is_a_failure() {
        for ending in [Ending::Status(1), Ending::Signal, Ending::Timeout(9), Ending::Flood] {
            assert_complaint(&judge_with(GOOD, "", ending), "exit", "");
        }
    }

    #[test]
    fn a_step_that_observed_a_bar_keeps_it() {
        let console = Console::parse(GOOD);
        assert_eq!(console.steps[1], Check::new("b", "x", "y | z", true));
    }

    #[test]
    fn a_boot_that_must_stop_passes_with_its_message_and_without_a_verdict_only() {
        let complaints_of = |text: &str, message: &str, also: &[&str]| {
            let also = also.iter().map(|text| (*text).to_owned()).collect();
            let stop = Stop { message: message.to_owned(), also };
            let expectation =
                Expectation { nonce: 0xab, steps: &[], verdict: &BTreeMap::new(), stop: Some(&stop) };
            let checks = Console::parse(text).judge(&expectation, Ending::Status(0));
            checks.iter().filter(|check| !check.pass).count()
        };
        let complaints = |text: &str, message| complaints_of(text, message, &[]);
        let text = "[deed] boot stopped: the ramdisk overlaps the device tree\n";
        assert_eq!(complaints(text, "overlaps the device tree"), 0);
        assert_eq!(complaints(text, "beyond RAM"), 1);
        assert_eq!(complaints(&text.replace("deed", "host"), "overlaps"), 1);
        assert_eq!(complaints(&format!("{text}{GOOD}"), "overlaps"), 1);
        assert_eq!(complaints("[deed] PANIC stack overflow\n", "PANIC stack"), 0);
        assert_eq!(complaints("[deed] PANIC stack overflow\n", "stack"), 1);
        let twice = "[deed] PANIC stack overflow\n[deed]   x0\n[deed] PANIC again\n";
        assert_eq!(complaints(twice, "PANIC stack"), 1);
        assert_eq!(complaints_of(text, "overlaps", &["ramdisk", "the device"]), 0);
        assert_eq!(complaints_of(text, "overlaps", &["ramdisk", "x0"]), 1);
    }

    #[test]
    fn facts_come_from_the_first_line_that_has_them() {
        let console = Console::parse(&format!("{GOOD}[deed] image base=0x1 end=0x2\n"));
        assert_eq!(console.facts("image ").unwrap()["base"], "0x40200000");
        assert!(console.facts("host stage-2 ").is_none());
    }
}
