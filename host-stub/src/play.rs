//! Lists of prepared calls, played over and over, each call counted by itself.
//!
//! A program writes the list and reads what came of it; the kernel plays it without leaving EL1, so that an
//! interval holds the call and nothing else. What an interval means is said in `arch::timed`.

use alloc::vec::Vec;

use abi::host::CALL_WORDS;

use crate::errno::Errno;
use crate::host::Host;
use crate::machine::Timed;
use crate::process::Process;

/// Calls in a list at most.
const ENTRIES: u64 = 16;
/// Rounds at most: the kernel takes no interrupt while it plays.
const ROUNDS: u64 = 100_000;

/// Words of an entry that the program writes: what ([`Timed`]), x0 to x6, and how much is added to each of
/// them after every round.
const PREPARED: usize = 1 + 2 * CALL_WORDS;
/// Words of an entry that come back: see [`Outcome`].
const OUTCOME: usize = 8;
const ENTRY_BYTES: u64 = (PREPARED + OUTCOME) as u64 * 8;

/// One call of a list.
struct Entry {
    what: Timed,
    words: [u64; CALL_WORDS],
    steps: [u64; CALL_WORDS],
    outcome: Outcome,
}

/// What came of an entry: ticks, x0 to x3 of the first round, and the number of rounds in which x0, x1 or x2
/// was another.
struct Outcome {
    least: u64,
    most: u64,
    sum: u64,
    first: Option<[u64; 4]>,
    different: u64,
}

impl Outcome {
    const NONE: Self = Self { least: u64::MAX, most: 0, sum: 0, first: None, different: 0 };

    fn note(&mut self, ticks: u64, results: [u64; 4]) {
        self.least = self.least.min(ticks);
        self.most = self.most.max(ticks);
        self.sum = self.sum.saturating_add(ticks);
        let first = *self.first.get_or_insert(results);
        if first.iter().zip(&results).take(3).any(|(a, b)| a != b) {
            self.different = self.different.saturating_add(1);
        }
    }

    fn words(&self) -> [u64; OUTCOME] {
        let [x0, x1, x2, x3] = self.first.unwrap_or_default();
        [self.least, self.most, self.sum, x0, x1, x2, x3, self.different]
    }
}

/// Plays the list at an address of the program's. EINVAL for a list that is empty, too long or not well formed.
pub fn play(
    host: &mut Host,
    process: &mut Process,
    list: u64,
    entries: u64,
    rounds: u64,
) -> Result<(), Errno> {
    if !(1..=ENTRIES).contains(&entries) || !(1..=ROUNDS).contains(&rounds) {
        return Err(Errno::EINVAL);
    }
    let address = |index: u64| list.checked_add(index.saturating_mul(ENTRY_BYTES)).ok_or(Errno::EFAULT);
    let mut calls = Vec::new();
    for index in 0..entries {
        let mut bytes = [0; PREPARED * 8];
        process.space.read(host, address(index)?, &mut bytes)?;
        calls.push(Entry::read(&bytes)?);
    }
    for _ in 0..rounds {
        for call in &mut calls {
            let (ticks, [x0, x1, x2, x3, ..]) = host.machine.timed(call.what, &call.words);
            call.outcome.note(ticks, [x0, x1, x2, x3]);
            for (word, step) in call.words.iter_mut().zip(call.steps) {
                *word = word.wrapping_add(step);
            }
        }
    }
    for (index, call) in (0..).zip(&calls) {
        let at = address(index)?.checked_add(PREPARED as u64 * 8).ok_or(Errno::EFAULT)?;
        let bytes: Vec<u8> = call.outcome.words().into_iter().flat_map(u64::to_le_bytes).collect();
        process.space.write(host, at, &bytes)?;
    }
    Ok(())
}

impl Entry {
    fn read(bytes: &[u8; PREPARED * 8]) -> Result<Self, Errno> {
        let mut words = [0; PREPARED];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let [what, a0, a1, a2, a3, a4, a5, a6, s0, s1, s2, s3, s4, s5, s6] = words;
        Ok(Self {
            what: Timed::from_word(what).ok_or(Errno::EINVAL)?,
            words: [a0, a1, a2, a3, a4, a5, a6],
            steps: [s0, s1, s2, s3, s4, s5, s6],
            outcome: Outcome::NONE,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_word_by_word_and_an_unknown_kind_is_refused() {
        let mut bytes = [0; PREPARED * 8];
        for (index, byte) in bytes.iter_mut().enumerate().filter(|(index, _)| index % 8 == 0) {
            *byte = (index / 8) as u8;
        }
        bytes[0] = 3;
        let entry = Entry::read(&bytes).unwrap();
        assert_eq!((entry.what, entry.words), (Timed::Hvc, [1, 2, 3, 4, 5, 6, 7]));
        assert_eq!(entry.steps, [8, 9, 10, 11, 12, 13, 14]);
        bytes[0] = 6;
        assert!(Entry::read(&bytes).is_err());
    }

    #[test]
    fn an_outcome_keeps_least_most_sum_and_counts_rounds_that_went_differently() {
        let mut outcome = Outcome::NONE;
        outcome.note(10, [0, 0, 1, 5]);
        outcome.note(8, [0, 0, 1, 6]);
        outcome.note(30, [0, 1, 0, 7]);
        assert_eq!(outcome.words(), [8, 30, 48, 0, 0, 1, 5, 1]);
    }
}
