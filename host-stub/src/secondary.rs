//! The other CPUs. They work for the kernel, running threads and vCPUs, or are hands of the research device: then each
//! plays one series again and again until it is told to end.
//!
//! A [`Secondary`] is all that a CPU which plays shares with the kernel, and all of it is atomic. Its state says whose turn
//! it is: whoever is in the kernel writes the series while the state is [`State::Idle`], the CPU itself while it is
//! [`State::Playing`], and each hands over by a store of the state that the other one's load of it sees.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::errno::Errno;
use crate::machine::Machine;
use crate::series::{RECORD_WORDS, Record, Step};

/// CPUs that the kernel starts at most, with the boot CPU.
pub const MAX_CPUS: usize = 8;
/// Records that a CPU plays at most.
pub const MAX_RECORDS: usize = 64;

/// Where a CPU stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// It is off, or on its way there: only the hypervisor knows which.
    Off = 0,
    /// It was asked to come and has not arrived.
    Coming = 1,
    /// It waits.
    Idle = 2,
    /// It plays.
    Playing = 3,
    /// It was told to turn itself off.
    Leaving = 4,
    /// It works for the kernel, or was asked to come for that, until the program has ended.
    Working = 5,
}

impl State {
    const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Coming,
            2 => Self::Idle,
            3 => Self::Playing,
            4 => Self::Leaving,
            5 => Self::Working,
            _ => Self::Off,
        }
    }
}

/// How a series is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How {
    /// Rounds, or 0: until it is told to end.
    pub rounds: u64,
    /// An abort does not end it.
    pub past_aborts: bool,
}

/// How far it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Where the CPU stands.
    pub state: State,
    /// Rounds played to their end.
    pub rounds: u64,
    /// Aborts taken.
    pub aborts: u64,
}

/// One record, and what came of it last.
struct Slot {
    record: [AtomicU64; RECORD_WORDS],
    results: [AtomicU64; RECORD_WORDS],
}

impl Slot {
    const fn new() -> Self {
        Self {
            record: [const { AtomicU64::new(0) }; RECORD_WORDS],
            results: [const { AtomicU64::new(0) }; RECORD_WORDS],
        }
    }
}

fn load(words: &[AtomicU64; RECORD_WORDS]) -> Record {
    let mut record = [0; RECORD_WORDS];
    for (to, from) in record.iter_mut().zip(words) {
        *to = from.load(Ordering::Relaxed);
    }
    record
}

/// A call as it is made in a round: its word 8 names one of x1 to x6, or none, to which word 9 is added after each.
fn in_round(mut record: Record, round: u64) -> Record {
    let [0, .., which, step] = record else { return record };
    if let 1..=6 = which
        && let Some(word) = record.get_mut(which as usize + 1)
    {
        *word = word.wrapping_add(step.wrapping_mul(round));
    }
    record
}

fn store(words: &[AtomicU64; RECORD_WORDS], record: &Record) {
    for (to, from) in words.iter().zip(record) {
        to.store(*from, Ordering::Relaxed);
    }
}

/// A CPU that is not the boot CPU.
pub struct Secondary {
    affinity: AtomicU64,
    state: AtomicU32,
    end: AtomicBool,
    wanted: AtomicU64,
    past_aborts: AtomicBool,
    played: AtomicU64,
    aborts: AtomicU64,
    count: AtomicU64,
    slots: [Slot; MAX_RECORDS],
}

impl core::fmt::Debug for Secondary {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Secondary").field("progress", &self.progress()).finish_non_exhaustive()
    }
}

impl Secondary {
    /// One that is off.
    pub const fn new() -> Self {
        Self {
            affinity: AtomicU64::new(0),
            state: AtomicU32::new(State::Off as u32),
            end: AtomicBool::new(false),
            wanted: AtomicU64::new(0),
            past_aborts: AtomicBool::new(false),
            played: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
            count: AtomicU64::new(0),
            slots: [const { Slot::new() }; MAX_RECORDS],
        }
    }

    /// The name that PSCI knows it by.
    pub fn affinity(&self) -> u64 {
        self.affinity.load(Ordering::Relaxed)
    }

    /// Sets that name.
    pub fn set_affinity(&self, affinity: u64) {
        self.affinity.store(affinity, Ordering::Relaxed);
    }

    /// Where it stands and how far it came.
    pub fn progress(&self) -> Progress {
        Progress {
            state: State::from_number(self.state.load(Ordering::Acquire)),
            rounds: self.played.load(Ordering::Relaxed),
            aborts: self.aborts.load(Ordering::Relaxed),
        }
    }

    /// Passes from one state to another; `false`, and nothing changes, if it is not in the first.
    fn pass(&self, from: State, to: State) -> bool {
        self.state.compare_exchange(from as u32, to as u32, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// It is asked to come. EBUSY if it is on, or comes already.
    pub fn call_in(&self) -> Result<(), Errno> {
        if self.pass(State::Off, State::Coming) { Ok(()) } else { Err(Errno::EBUSY) }
    }

    /// It is asked to come and to work for the kernel. EBUSY if it is on, or comes already.
    pub fn call_to_work(&self) -> Result<(), Errno> {
        if self.pass(State::Off, State::Working) { Ok(()) } else { Err(Errno::EBUSY) }
    }

    /// The call was refused.
    pub fn stays_off(&self) {
        if !self.pass(State::Coming, State::Off) {
            self.pass(State::Working, State::Off);
        }
    }

    /// Gives it a series. EINVAL if that is none, or too long; EBUSY if the CPU does not wait for one.
    pub fn play(&self, records: &[Record], how: How) -> Result<(), Errno> {
        let is_series = records.iter().all(|record| Step::from_record(record).is_some());
        if !is_series || !(1..=MAX_RECORDS).contains(&records.len()) {
            return Err(Errno::EINVAL);
        }
        if self.progress().state != State::Idle {
            return Err(Errno::EBUSY);
        }
        for (slot, record) in self.slots.iter().zip(records) {
            store(&slot.record, record);
            store(&slot.results, &[0; RECORD_WORDS]);
        }
        self.count.store(records.len() as u64, Ordering::Relaxed);
        self.wanted.store(how.rounds, Ordering::Relaxed);
        self.past_aborts.store(how.past_aborts, Ordering::Relaxed);
        self.played.store(0, Ordering::Relaxed);
        self.aborts.store(0, Ordering::Relaxed);
        self.end.store(false, Ordering::Relaxed);
        self.pass(State::Idle, State::Playing);
        Ok(())
    }

    /// Tells it to end after this round.
    pub fn end(&self) {
        self.end.store(true, Ordering::Relaxed);
    }

    /// What came of the records of the last series when they were played last. EBUSY while it plays.
    pub fn results(&self) -> Result<impl Iterator<Item = Record>, Errno> {
        if self.progress().state == State::Playing {
            return Err(Errno::EBUSY);
        }
        let count = self.count.load(Ordering::Relaxed) as usize;
        Ok(self.slots.iter().take(count).map(|slot| load(&slot.results)))
    }

    /// Tells it to turn itself off. EBUSY if it does not wait.
    pub fn send_away(&self) -> Result<(), Errno> {
        if self.pass(State::Idle, State::Leaving) { Ok(()) } else { Err(Errno::EBUSY) }
    }

    /// The CPU's side: works if it was called for that, and else plays what it is given, and calls `wait` while there is
    /// nothing, until it is sent away.
    pub fn serve<M: Machine + ?Sized>(&self, machine: &M, wait: impl Fn(), work: impl FnOnce()) {
        if self.progress().state == State::Working {
            work();
            self.pass(State::Working, State::Off);
            return;
        }
        self.pass(State::Coming, State::Idle);
        loop {
            match self.progress().state {
                State::Playing => {
                    self.play_all(machine);
                    self.pass(State::Playing, State::Idle);
                }
                State::Leaving => {
                    self.pass(State::Leaving, State::Off);
                    return;
                }
                State::Off | State::Coming | State::Idle | State::Working => wait(),
            }
        }
    }

    fn play_all<M: Machine + ?Sized>(&self, machine: &M) {
        let wanted = self.wanted.load(Ordering::Relaxed);
        let past_aborts = self.past_aborts.load(Ordering::Relaxed);
        let count = self.count.load(Ordering::Relaxed) as usize;
        while !self.end.load(Ordering::Relaxed) {
            for slot in self.slots.iter().take(count) {
                let round = self.played.load(Ordering::Relaxed);
                let Some(step) = Step::from_record(&in_round(load(&slot.record), round)) else { return };
                let (results, abort) = step.perform(machine);
                store(&slot.results, &results);
                if abort.is_some() {
                    self.aborts.fetch_add(1, Ordering::Relaxed);
                    if !past_aborts {
                        return;
                    }
                }
            }
            let played = self.played.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
            if played == wanted {
                return;
            }
        }
    }
}

impl Default for Secondary {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use abi::HostState;

    use super::*;
    use crate::mm::Pfn;
    use crate::testing::FakeMachine;

    const BASE: u64 = FakeMachine::BASE;
    const LOAD: Record = [1, BASE, 0, 0, 0, 0, 0, 0, 0, 0];

    fn idle() -> Secondary {
        let secondary = Secondary::new();
        secondary.call_in().unwrap();
        assert_eq!(secondary.progress().state, State::Coming);
        secondary.pass(State::Coming, State::Idle);
        secondary
    }

    /// Serves until there is nothing to do, and sends the CPU away then.
    fn serve(secondary: &Secondary, machine: &FakeMachine) {
        secondary.serve(machine, || secondary.send_away().unwrap(), || panic!("it was not called to work"));
        assert_eq!(secondary.progress().state, State::Off);
    }

    #[test]
    fn a_series_is_played_as_often_as_it_was_wanted() {
        let machine = FakeMachine::new(1);
        let secondary = idle();
        let records = [[2, BASE, 9, 0, 0, 0, 0, 0, 0, 0], LOAD];
        secondary.play(&records, How { rounds: 3, past_aborts: false }).unwrap();
        assert_eq!(secondary.results().err(), Some(Errno::EBUSY));
        serve(&secondary, &machine);
        assert_eq!(secondary.progress(), Progress { state: State::Off, rounds: 3, aborts: 0 });
        let results: alloc::vec::Vec<Record> = secondary.results().unwrap().collect();
        assert_eq!(results, [[9, 0, 0, 0, 0, 0, 0, 0, 0, 0]; 2]);
    }

    #[test]
    fn an_abort_ends_a_series_unless_it_is_to_go_on() {
        let machine = FakeMachine::new(1);
        machine.set_state(Pfn::containing(BASE), HostState::NoPage);
        for (past_aborts, rounds, aborts) in [(false, 0, 1), (true, 5, 5)] {
            let secondary = idle();
            secondary.play(&[LOAD], How { rounds: 5, past_aborts }).unwrap();
            serve(&secondary, &machine);
            assert_eq!(secondary.progress(), Progress { state: State::Off, rounds, aborts });
            assert_eq!(secondary.results().unwrap().next().unwrap()[1], 1);
        }
    }

    #[test]
    fn a_series_without_end_ends_when_it_is_told_to() {
        let machine = FakeMachine::new(1);
        let secondary = idle();
        secondary.play(&[LOAD], How { rounds: 0, past_aborts: false }).unwrap();
        secondary.end();
        serve(&secondary, &machine);
        assert_eq!(secondary.progress().rounds, 0);
    }

    #[test]
    fn a_cpu_that_is_called_to_work_plays_nothing() {
        let machine = FakeMachine::new(1);
        let secondary = Secondary::new();
        secondary.call_to_work().unwrap();
        assert_eq!(secondary.call_in(), Err(Errno::EBUSY));
        assert_eq!(secondary.play(&[LOAD], How { rounds: 1, past_aborts: false }), Err(Errno::EBUSY));
        let worked = core::cell::Cell::new(0);
        secondary.serve(&machine, || panic!("it waits"), || worked.set(worked.get() + 1));
        assert_eq!((worked.get(), secondary.progress().state), (1, State::Off));
        secondary.call_to_work().unwrap();
        secondary.stays_off();
        assert_eq!(secondary.progress().state, State::Off);
    }

    #[test]
    fn nothing_is_asked_of_a_cpu_that_does_not_wait() {
        let secondary = Secondary::new();
        let how = How { rounds: 1, past_aborts: false };
        assert_eq!(secondary.play(&[LOAD], how), Err(Errno::EBUSY));
        assert_eq!(secondary.send_away(), Err(Errno::EBUSY));
        secondary.call_in().unwrap();
        assert_eq!(secondary.call_in(), Err(Errno::EBUSY));
        secondary.stays_off();
        secondary.call_in().unwrap();
    }

    #[test]
    fn a_call_may_change_one_of_its_arguments_from_round_to_round() {
        assert_eq!(in_round([0, 9, 1, 2, 3, 4, 5, 6, 2, 10], 3), [0, 9, 1, 32, 3, 4, 5, 6, 2, 10]);
        for same in [[0, 9, 1, 2, 3, 4, 5, 6, 0, 10], [1, 8, 1, 2, 3, 4, 5, 6, 2, 10]] {
            assert_eq!(in_round(same, 3), same);
        }
    }

    #[test]
    fn a_series_must_be_one() {
        let secondary = idle();
        let how = How { rounds: 1, past_aborts: false };
        for bad in [&[][..], &[[7; RECORD_WORDS]][..], &[LOAD; MAX_RECORDS + 1][..]] {
            assert_eq!(secondary.play(bad, how), Err(Errno::EINVAL));
        }
        assert_eq!(secondary.progress().state, State::Idle);
    }
}
