//! Calls, loads, stores and copies that the kernel makes one after the other because a program says so.

use abi::host::CALL_WORDS;

use crate::machine::{Abort, Machine, Memory};
use crate::mm::{PAGE, Pfn};

/// One of a series: in what to do (0 call, 1 load, 2 store, 3 copy a page, 4 wait for a value, 5 call the
/// firmware), its arguments; out its results.
///
/// A call takes x0 to x6 and gives x0 to x9; a load takes an address, a store an address and a value, and both give
/// value, 0 or 1 for an abort, ESR, FAR; a copy takes the frame numbers of source and target, and gives 0 or 1 for
/// an abort; a wait takes an address and a value, loads until it finds the value, though not for ever, and gives what it
/// found as a load does; a call of the firmware takes x0 to x3 and gives them.
pub type Record = [u64; RECORD_WORDS];
/// Words of a record.
pub const RECORD_WORDS: usize = 10;
/// Bytes of a record.
pub const RECORD_BYTES: usize = RECORD_WORDS * 8;

/// Loads of a wait that finds nothing: some seconds.
const PATIENCE: u64 = 100_000_000;

/// What a record asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A call with x0 to x6.
    Call([u64; CALL_WORDS]),
    /// A load of 8 bytes.
    Load(u64),
    /// A store of 8 bytes.
    Store(u64, u64),
    /// A copy from one page to another.
    Copy(Pfn, Pfn),
    /// Loads of 8 bytes until they give a value.
    Await(u64, u64),
    /// An SMC with x0 to x3.
    Smc([u64; 4]),
}

impl Step {
    /// Reads a record; `None` if there is nothing of its kind, or an address is not 8-byte aligned.
    pub fn from_record(record: &Record) -> Option<Self> {
        let [kind, call @ .., _, _] = record;
        let [a, b, c, d, ..] = *call;
        match *kind {
            0 => Some(Self::Call(*call)),
            1 if a.is_multiple_of(8) => Some(Self::Load(a)),
            2 if a.is_multiple_of(8) => Some(Self::Store(a, b)),
            3 => Some(Self::Copy(Pfn(a), Pfn(b))),
            4 if a.is_multiple_of(8) => Some(Self::Await(a, b)),
            5 => Some(Self::Smc([a, b, c, d])),
            _ => None,
        }
    }

    /// Does it. Returns its results, and the abort if an access took one.
    pub fn perform<M: Machine + ?Sized>(self, machine: &M) -> (Record, Option<Abort>) {
        let (value, outcome) = match self {
            Self::Call(words) => return (machine.call_words(&words), None),
            Self::Smc(words) => {
                let [x0, x1, x2, x3] = machine.smc(words);
                return ([x0, x1, x2, x3, 0, 0, 0, 0, 0, 0], None);
            }
            Self::Load(address) => (0, machine.load(address)),
            Self::Store(address, value) => (value, machine.store(address, value).map(|()| value)),
            Self::Await(address, value) => (0, wait_for(machine, address, value)),
            Self::Copy(from, to) => {
                let mut page = [0; PAGE as usize];
                let read = machine.read(from.address(), &mut page);
                let copied = read.and_then(|()| machine.write(to.address(), &page));
                return ([u64::from(copied.is_err()), 0, 0, 0, 0, 0, 0, 0, 0, 0], copied.err());
            }
        };
        match outcome {
            Ok(value) => ([value, 0, 0, 0, 0, 0, 0, 0, 0, 0], None),
            Err(abort) => ([value, 1, abort.esr, abort.far, 0, 0, 0, 0, 0, 0], Some(abort)),
        }
    }
}

/// Loads until that gives a value, or has given another [`PATIENCE`] times. Returns what it gave last.
fn wait_for<M: Memory + ?Sized>(machine: &M, address: u64, value: u64) -> Result<u64, Abort> {
    let mut found = machine.load(address)?;
    for _ in 0..PATIENCE {
        if found == value {
            break;
        }
        found = machine.load(address)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use abi::HostState;

    use super::*;
    use crate::testing::FakeMachine;

    const BASE: u64 = FakeMachine::BASE;

    fn record(kind: u64, a: u64, b: u64) -> Record {
        [kind, a, b, 0, 0, 0, 0, 0, 0, 0]
    }

    #[test]
    fn a_record_says_what_is_done_and_an_unknown_one_nothing() {
        assert_eq!(Step::from_record(&record(0, 1, 2)), Some(Step::Call([1, 2, 0, 0, 0, 0, 0])));
        assert_eq!(Step::from_record(&record(1, 8, 0)), Some(Step::Load(8)));
        assert_eq!(Step::from_record(&record(2, 8, 5)), Some(Step::Store(8, 5)));
        assert_eq!(Step::from_record(&record(3, 8, 5)), Some(Step::Copy(Pfn(8), Pfn(5))));
        assert_eq!(Step::from_record(&record(4, 8, 5)), Some(Step::Await(8, 5)));
        assert_eq!(Step::from_record(&record(5, 8, 5)), Some(Step::Smc([8, 5, 0, 0])));
        for bad in [record(1, 4, 0), record(2, 12, 0), record(4, 4, 0), record(6, 0, 0)] {
            assert_eq!(Step::from_record(&bad), None);
        }
    }

    #[test]
    fn an_access_tells_its_value_or_its_abort() {
        let machine = FakeMachine::new(2);
        assert_eq!(Step::Store(BASE, 7).perform(&machine), (record(7, 0, 0), None));
        assert_eq!(Step::Load(BASE).perform(&machine), (record(7, 0, 0), None));
        assert_eq!(Step::Await(BASE, 7).perform(&machine), (record(7, 0, 0), None));
        machine.set_state(Pfn::containing(BASE), HostState::NoPage);
        let (results, abort) = Step::Store(BASE, 9).perform(&machine);
        let abort = abort.unwrap();
        assert_eq!(results, [9, 1, abort.esr, BASE, 0, 0, 0, 0, 0, 0]);
        let page = Pfn::containing(BASE);
        assert_eq!(Step::Copy(page.plus(1), page).perform(&machine), (record(1, 0, 0), Some(abort)));
    }
}
