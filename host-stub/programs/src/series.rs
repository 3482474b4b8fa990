//! Calls, loads and stores that the kernel makes one after the other.

use abi::HostCall;
use abi::host::CALL_WORDS;

use crate::deed::{Answer, Touch, read_answer};

/// Calls, loads and stores of the kernel that are made one after the other with one system call, at most
/// [`Series::MAX`] of them.
#[derive(Clone, Debug)]
pub struct Series {
    records: [[u64; 10]; Series::MAX],
    count: usize,
}

impl Default for Series {
    fn default() -> Self {
        Self { records: [[0; 10]; Self::MAX], count: 0 }
    }
}

impl Series {
    /// Records that one series can have.
    pub const MAX: usize = 256;

    /// Address and number of the records.
    pub(crate) fn argument(&mut self) -> [u64; 2] {
        [self.records.as_mut_ptr() as u64, self.count as u64]
    }

    fn push(&mut self, record: [u64; 10]) -> usize {
        let at = self.count;
        *self.records.get_mut(at).expect("room in the series") = record;
        self.count += 1;
        at
    }

    /// Adds HVC #0 with these registers; returns its place.
    pub fn call_words(&mut self, [a, b, c, d, e, f, g]: [u64; CALL_WORDS]) -> usize {
        self.push([0, a, b, c, d, e, f, g, 0, 0])
    }

    /// Adds a call.
    pub fn call(&mut self, call: HostCall) -> usize {
        self.call_words(call.encode())
    }

    /// Adds a call of which one of x1 to x6 grows by one in each round that another CPU plays.
    pub fn growing_call(&mut self, call: HostCall, register: u64) -> usize {
        let [a, b, c, d, e, f, g] = call.encode();
        self.push([0, a, b, c, d, e, f, g, register, 1])
    }

    /// Adds a load.
    pub fn load(&mut self, address: u64) -> usize {
        self.push([1, address, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Adds a store.
    pub fn store(&mut self, address: u64, value: u64) -> usize {
        self.push([2, address, value, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Adds a copy of a page, by frame numbers.
    pub fn copy(&mut self, from: u64, to: u64) -> usize {
        self.push([3, from, to, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Adds a wait until a load gives this value.
    pub fn wait_for(&mut self, address: u64, value: u64) -> usize {
        self.push([4, address, value, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Adds SMC #0 with these registers.
    pub fn smc(&mut self, [a, b, c, d]: [u64; 4]) -> usize {
        self.push([5, a, b, c, d, 0, 0, 0, 0, 0])
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.count = 0;
    }

    /// What came of a call.
    pub fn answer(&self, at: usize) -> Answer {
        read_answer(&self.records[at])
    }

    /// What came of a load or store.
    pub fn touched(&self, at: usize) -> Touch {
        match self.records[at] {
            [value, 0, ..] => Touch::Done(value),
            [_, _, syndrome, address, ..] => Touch::Abort { syndrome, address },
        }
    }

    /// Whether a copy was done.
    pub fn copied(&self, at: usize) -> bool {
        self.records[at][0] == 0
    }
}
