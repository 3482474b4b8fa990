//! The report of a program: prose for people, and exactly one line per checked step for the machine that
//! reads the console.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::{self, Display, Write};

/// Where finished lines go; each call gets one whole line with its newline.
pub type Sink = fn(&str);

/// Counts steps and prints them.
pub struct Steps {
    sink: Sink,
    names: Vec<String>,
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps")
            .field("passed", &self.passed)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl Steps {
    /// Starts a report.
    pub fn new(sink: Sink) -> Self {
        Self { sink, names: Vec::new(), passed: 0, failed: 0, skipped: 0 }
    }

    /// Prints prose.
    pub fn tell(&self, line: impl Display) {
        (self.sink)(&format(format_args!("{}\n", OneLine(&line.to_string()))));
    }

    /// A step that passes if `pass`; returns it.
    pub fn check(&mut self, name: &str, expected: impl Display, observed: impl Display, pass: bool) -> bool {
        // A name that comes twice would hide one of its steps from who reads them.
        let twice = self.names.iter().any(|known| known == name);
        let pass = pass && !twice;
        if !twice {
            self.names.push(name.to_string());
        }
        *(if pass { &mut self.passed } else { &mut self.failed }) += 1;
        (self.sink)(&step_line(name, &expected.to_string(), &observed.to_string(), pass));
        pass
    }

    /// A step that passes if what was observed is what was expected; returns whether.
    pub fn equal<T: PartialEq + Display>(&mut self, name: &str, expected: T, observed: T) -> bool {
        let pass = expected == observed;
        self.check(name, expected, observed, pass)
    }

    /// The same for numbers that are better read in hexadecimal.
    pub fn equal_hex(&mut self, name: &str, expected: u64, observed: u64) -> bool {
        self.check(name, Hex(expected), Hex(observed), expected == observed)
    }

    /// A step that this build cannot check; says so and counts it as neither.
    pub fn skip(&mut self, name: &str, why: impl Display) {
        self.skipped += 1;
        (self.sink)(&format(format_args!("SKIP {} | {}\n", field(name), field(&why.to_string()))));
    }

    /// A row of a benchmark: instructions of the cheapest run, of all runs, and the number of runs.
    pub fn row(&self, operation: &str, least: u64, sum: u64, runs: u64) {
        (self.sink)(&format(format_args!("ROW {} | {least} | {sum} | {runs}\n", field(operation))));
    }

    /// Number of steps that passed.
    pub fn passed(&self) -> usize {
        self.passed
    }

    /// Number of steps that failed.
    pub fn failed(&self) -> usize {
        self.failed
    }

    /// Prints the last line; returns the number of failed steps.
    pub fn finish(&self) -> usize {
        (self.sink)(&format(format_args!("DONE {} passed, {} failed\n", self.passed, self.failed)));
        self.failed
    }
}

/// Formats into a string.
pub fn format(arguments: fmt::Arguments<'_>) -> String {
    let mut text = String::new();
    // Writing to a string fails only if a Display implementation does; then the text is shorter.
    let _ = text.write_fmt(arguments);
    text
}

/// A number shown in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hex(pub u64);

impl Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

fn step_line(name: &str, expected: &str, observed: &str, pass: bool) -> String {
    let verdict = if pass { "pass" } else { "fail" };
    format(format_args!("STEP {} | {} | {} | {verdict}\n", field(name), field(expected), field(observed)))
}

/// What a field may contain: no separator and no end of line, whatever a guest has sent.
fn field(text: &str) -> String {
    text.chars().map(|c| if c == '|' || c.is_control() { ' ' } else { c }).collect()
}

struct OneLine<'a>(&'a str);

impl Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Prose must not be taken for a step, the hypervisor's or the kernel's line.
        let reserved = ["STEP ", "DONE ", "SKIP ", "ROW ", "["];
        if reserved.iter().any(|start| self.0.starts_with(start)) {
            f.write_str("> ")?;
        }
        self.0.chars().try_for_each(|c| f.write_char(if c.is_control() { ' ' } else { c }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;
    use std::sync::Mutex;

    static LINES: Mutex<String> = Mutex::new(String::new());

    fn collect(line: &str) {
        LINES.lock().unwrap().push_str(line);
    }

    #[test]
    fn a_report_has_one_line_for_each_step_and_a_count_at_its_end() {
        let mut steps = Steps::new(collect);
        steps.tell("The VMM begins.");
        steps.tell("STEP forged | 1 | 1 | pass");
        assert!(steps.equal("count-is-right", 3, 3));
        assert!(!steps.equal_hex("word-is-right", 0x10, 0x20));
        assert!(!steps.equal("count-is-right", 3, 3), "a name that comes twice fails");
        steps.skip("census-is-equal", "no test calls");
        steps.row("share | one page", 3, 10, 2);
        assert_eq!(steps.finish(), 2);
        assert_eq!(
            *LINES.lock().unwrap(),
            "The VMM begins.\n\
             > STEP forged | 1 | 1 | pass\n\
             STEP count-is-right | 3 | 3 | pass\n\
             STEP word-is-right | 0x10 | 0x20 | fail\n\
             STEP count-is-right | 3 | 3 | fail\n\
             SKIP census-is-equal | no test calls\n\
             ROW share   one page | 3 | 10 | 2\n\
             DONE 1 passed, 2 failed\n"
        );
    }

    #[test]
    fn a_field_from_a_guest_cannot_end_the_line_or_add_a_field() {
        assert_eq!(step_line("a|b", "1\nSTEP x", "2", true), "STEP a b | 1 STEP x | 2 | pass\n");
    }
}
