//! Lists of prepared calls that the kernel plays and counts: the program's side of `host-stub/src/play.rs`.

use abi::HostCall;
use abi::host::CALL_WORDS;

use crate::deed::Deed;
use crate::{Failure, failure};

/// Ticks of an interval with nothing in it.
pub const EMPTY: u64 = 1;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum What {
    /// Nothing.
    Nothing = 0,
    /// 100 instructions that do nothing.
    Nops = 1,
    /// A loop of 10,000 passes of two instructions.
    Loop = 2,
    /// `HVC #0`.
    Hvc = 3,
    /// `SMC #0`.
    Smc = 4,
    /// A load by the kernel from a physical address.
    Load = 5,
}

/// One entry of a list; layout known to the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    what: u64,
    words: [u64; CALL_WORDS],
    steps: [u64; CALL_WORDS],
    least: u64,
    most: u64,
    sum: u64,
    first: [u64; 4],
    different: u64,
}
const _: () = assert!(size_of::<Entry>() == 23 * 8);

impl Entry {
    /// Does this with x0 to x6.
    pub fn new(what: What, words: [u64; CALL_WORDS]) -> Self {
        let (steps, first) = ([0; CALL_WORDS], [0; 4]);
        Self { what: what as u64, words, steps, least: 0, most: 0, sum: 0, first, different: 0 }
    }

    /// Makes a host call.
    pub fn call(call: HostCall) -> Self {
        Self::new(What::Hvc, call.encode())
    }

    /// Makes a host call, and each round the next one of this kind: its registers differ from round to round as
    /// those of `next` do from those of `call`.
    pub fn advancing(call: HostCall, next: HostCall) -> Self {
        let mut entry = Self::call(call);
        for ((step, next), word) in entry.steps.iter_mut().zip(next.encode()).zip(entry.words) {
            *step = next.wrapping_sub(word);
        }
        entry
    }

    /// Loads from an address that is this much higher each round.
    pub fn loads(address: u64, step: u64) -> Self {
        let mut entry = Self::new(What::Load, [address, 0, 0, 0, 0, 0, 0]);
        let [first, ..] = &mut entry.steps;
        *first = step;
        entry
    }

    /// Least ticks of an interval, as read.
    pub fn raw(&self) -> u64 {
        self.least
    }

    /// Instructions at least, without those of counting.
    pub fn least(&self) -> u64 {
        self.least.saturating_sub(EMPTY)
    }

    /// Instructions at most.
    pub fn most(&self) -> u64 {
        self.most.saturating_sub(EMPTY)
    }

    /// Instructions of all rounds.
    pub fn sum(&self, rounds: u64) -> u64 {
        self.sum.saturating_sub(EMPTY * rounds)
    }

    /// x0 to x3 of the first round.
    pub fn results(&self) -> [u64; 4] {
        self.first
    }

    /// Whether each round gave this x0, x1 and x2.
    pub fn always(&self, x: [u64; 3]) -> bool {
        let [x0, x1, x2, _] = self.first;
        self.different == 0 && [x0, x1, x2] == x
    }
}

/// Plays a list this many times.
pub fn play(deed: &Deed, list: &mut [Entry], rounds: u64) -> Result<(), Failure> {
    let address = list.as_mut_ptr() as u64;
    deed.play([address, list.len() as u64, rounds])?;
    match core::hint::black_box(list).iter().all(|entry| entry.least <= entry.most) {
        true => Ok(()),
        false => Err(failure!("the kernel played nothing")),
    }
}
