//! What was played: the calls of the program that is under way, and how often each call had each outcome.

use host_programs::steps::Steps;
use spec::call::{CALLS, OUTCOMES};
use spec::{Call, Outcome};

use crate::guest::Act;

/// Calls of one program that are remembered: all of them, unless guests need their pages again and again.
const REMEMBERED: usize = 512;

/// Something that was done.
#[derive(Clone, Copy, Debug)]
#[expect(dead_code, reason = "the fields are read by Debug, where the story is told")]
pub(crate) enum Deed {
    /// A call of the specification.
    Call(Call, Outcome),
    /// Two, made at the same time, in the order in which they took effect.
    Together([(Call, Outcome); 2]),
    /// Another access of a guest.
    Access {
        /// The VM.
        vm: u8,
        /// What it did.
        act: Act,
        /// What came of it.
        outcome: Outcome,
    },
    /// An absurd call of the host.
    AbsurdHost([u64; 7]),
    /// An absurd call of a guest.
    AbsurdGuest {
        /// The VM.
        vm: u8,
        /// Its x0 to x3.
        words: [u64; 4],
    },
}

/// The story and the counts.
pub(crate) struct Tale {
    story: [Option<Deed>; REMEMBERED],
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

    /// Something was done.
    pub(crate) fn note(&mut self, deed: Deed) {
        self.story[self.length % REMEMBERED] = Some(deed);
        self.length += 1;
        self.calls += 1;
    }

    /// Two calls were made at the same time, and took effect in this order.
    pub(crate) fn note_together(&mut self, calls: [(Call, Outcome); 2]) {
        self.note(Deed::Together(calls));
        self.calls += 1;
        for (call, outcome) in calls {
            self.pairs[call.kind()][outcome.kind()] += 1;
        }
    }

    /// A call of the specification was made.
    pub(crate) fn note_call(&mut self, call: Call, outcome: Outcome) {
        self.note(Deed::Call(call, outcome));
        self.pairs[call.kind()][outcome.kind()] += 1;
    }

    /// Number of pairs of a call and an outcome that were seen.
    pub(crate) fn pairs(&self) -> usize {
        self.pairs.iter().flatten().filter(|count| **count > 0).count()
    }

    /// Prints the calls of the program, oldest first.
    pub(crate) fn tell_story(&self, steps: &Steps) {
        for at in self.length.saturating_sub(REMEMBERED)..self.length {
            match self.story[at % REMEMBERED] {
                Some(Deed::Call(call, outcome)) => {
                    steps.tell(format_args!("  {}: {call} -> {outcome}", at + 1));
                }
                Some(Deed::Together([(call, outcome), (next, its)])) => {
                    steps.tell(format_args!(
                        "  {}: {call} -> {outcome}, and on another CPU at once {next} -> {its}",
                        at + 1
                    ));
                }
                Some(other) => steps.tell(format_args!("  {}: {other:x?}", at + 1)),
                None => {}
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
