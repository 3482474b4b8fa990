//! What was played: the calls of the program that is under way, and how often each call had each outcome.

use host_programs::steps::Steps;
use spec::call::{CALLS, OUTCOMES};
use spec::{Call, Outcome};

/// Calls of one program that are remembered: all of them, unless guests need their pages again and again.
const REMEMBERED: usize = 512;

/// The story and the counts.
pub(crate) struct Tale {
    story: [Option<(Call, Outcome)>; REMEMBERED],
    length: usize,
    pairs: [[u32; OUTCOMES.len()]; CALLS.len()],
    /// Calls of all programs, those about absurd words and other loads and fetches of guests among them.
    pub(crate) calls: u64,
}

impl Tale {
    pub(crate) const fn new() -> Self {
        Self { story: [None; REMEMBERED], length: 0, pairs: [[0; OUTCOMES.len()]; CALLS.len()], calls: 0 }
    }

    /// A new program begins.
    pub(crate) fn begin(&mut self) {
        self.length = 0;
    }

    /// A call was made.
    pub(crate) fn note(&mut self, call: Call, outcome: Outcome) {
        self.story[self.length % REMEMBERED] = Some((call, outcome));
        self.length += 1;
        self.calls += 1;
        self.pairs[call.kind()][outcome.kind()] += 1;
    }

    /// Number of pairs of a call and an outcome that were seen.
    pub(crate) fn pairs(&self) -> usize {
        self.pairs.iter().flatten().filter(|count| **count > 0).count()
    }

    /// Prints the calls of the program, oldest first.
    pub(crate) fn tell_story(&self, steps: &Steps) {
        for at in self.length.saturating_sub(REMEMBERED)..self.length {
            if let Some((call, outcome)) = self.story[at % REMEMBERED] {
                steps.tell(format_args!("  {}: {call:?} -> {outcome:?}", at + 1));
            }
        }
    }

    /// Prints how often each call had each outcome.
    pub(crate) fn tell_pairs(&self, steps: &Steps) {
        for (name, counts) in CALLS.iter().zip(&self.pairs) {
            for (outcome, count) in OUTCOMES.iter().zip(counts).filter(|(_, count)| **count > 0) {
                steps.tell(format_args!("  {name}: {outcome}: {count}"));
            }
        }
    }
}
