//! What a host must not do, and what it is told: calls with the error that the interface's documents give
//! for them, and a watch that sees whether a refused call has changed something all the same.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use abi::host::CALL_WORDS;
use abi::{Error, HostCall};

use crate::Failure;
use crate::census::Census;
use crate::deed::{Answer, Deed, PageState};
use crate::steps::{Steps, format};

/// What a hostile call must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// This error.
    Error(Error),
    /// No such call.
    NotSupported,
}

impl Expected {
    fn is(self, answer: Answer) -> bool {
        match self {
            Self::Error(error) => answer.is_error(error),
            Self::NotSupported => answer == Answer::NotSupported,
        }
    }
}

impl core::fmt::Display for Expected {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Error(error) => write!(f, "{error:?}"),
            Self::NotSupported => f.write_str("NOT_SUPPORTED"),
        }
    }
}

/// One hostile call.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// The step's name.
    pub name: &'static str,
    /// x0 to x6.
    pub words: [u64; CALL_WORDS],
    /// The answer that it must get.
    pub expected: Expected,
}

/// A call that must be refused with an error.
pub fn refusal(name: &'static str, call: HostCall, error: Error) -> Refusal {
    Refusal { name, words: call.encode(), expected: Expected::Error(error) }
}

/// The same for registers that no typed call makes.
pub fn raw_refusal(name: &'static str, words: [u64; CALL_WORDS], expected: Expected) -> Refusal {
    Refusal { name, words, expected }
}

/// Pages and counts that a refused call must leave as they are.
#[derive(Debug)]
pub struct Watch {
    pages: Vec<u64>,
}

#[derive(Debug, PartialEq, Eq)]
struct Snapshot {
    census: Option<Census>,
    pages: Vec<(Option<PageState>, bool)>,
}

impl Watch {
    /// Watches these pages, and the census.
    pub fn new(pages: &[u64]) -> Self {
        Self { pages: pages.to_vec() }
    }

    fn snapshot(&self, deed: &Deed) -> Result<Snapshot, Failure> {
        let state = |pfn: &u64| Ok((deed.page_state(*pfn)?, deed.accessible(*pfn)?));
        let pages = self.pages.iter().map(state).collect::<Result<_, Failure>>()?;
        Ok(Snapshot { census: deed.census()?, pages })
    }

    fn difference(&self, before: &Snapshot, after: &Snapshot) -> String {
        let mut text = String::new();
        for ((pfn, (old, was)), (new, is)) in self.pages.iter().zip(&before.pages).zip(&after.pages) {
            if (old, was) != (new, is) {
                text.push_str(&format(format_args!("; page {pfn:#x} changed")));
                if let (Some(old), Some(new)) = (old, new) {
                    text.push_str(&format(format_args!(" from {old} to {new}")));
                }
            }
        }
        if before.census != after.census {
            text.push_str("; census changed");
            if let (Some(old), Some(new)) = (before.census, after.census) {
                text.push_str(&format(format_args!(" from {old} to {new}")));
            }
        }
        text
    }
}

/// Makes every call; each is a step that passes if the answer is the expected one and nothing changed.
pub fn try_all(deed: &Deed, steps: &mut Steps, watch: &Watch, rows: &[Refusal]) -> Result<(), Failure> {
    for row in rows {
        let before = watch.snapshot(deed)?;
        let answer = deed.answer(row.words)?;
        let after = watch.snapshot(deed)?;
        let right = row.expected.is(answer);
        let mut observed = answer.to_string();
        observed.push_str(&watch.difference(&before, &after));
        steps.check(row.name, row.expected, observed, right && before == after);
    }
    Ok(())
}

/// Makes calls; returns how many were refused as expected and changed nothing.
pub fn count_refused(
    deed: &Deed,
    watch: &Watch,
    calls: impl Iterator<Item = [u64; CALL_WORDS]>,
    expected: Expected,
) -> Result<usize, Failure> {
    let before = watch.snapshot(deed)?;
    let mut refused = 0;
    for words in calls {
        let answer = deed.answer(words)?;
        refused += usize::from(expected.is(answer));
    }
    Ok(if watch.snapshot(deed)? == before { refused } else { 0 })
}
