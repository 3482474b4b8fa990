//! What the kernel asks of the machine and of EL2. Hardware implements these traits in `arch`; tests
//! implement them with arrays and a fake EL2.

use abi::HostCall;
use abi::host::{CALL_WORDS, HostResult, RESULT_WORDS};

use crate::mm::Pfn;
use crate::process::context::{FpState, UserContext};
use crate::secondary::Secondary;

/// Nanoseconds between two ticks of each CPU's timer.
pub const TICK: u64 = 10_000_000;

/// An access of the kernel that EL2 (or the MMU) refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1.
    pub far: u64,
}

impl Abort {
    /// ISS bit S1PTW, with which Deed marks the aborts that it injects.
    pub const S1PTW: u64 = 1 << 7;

    /// Whether this is EL2's answer to an illegal access: a synchronous external abort with the mark.
    pub const fn is_from_el2(&self) -> bool {
        crate::process::trap::is_marked_external_abort(self.esr)
    }
}

/// The hypervisor, as its host calls it.
pub trait Hypervisor {
    /// Makes the call with these x0 to x6; returns x0 to x9.
    fn call_words(&self, words: &[u64; CALL_WORDS]) -> [u64; RESULT_WORDS];

    /// Makes a call; `None` where no Deed answers, or answers with what is no result.
    fn call(&self, call: HostCall) -> Option<HostResult> {
        HostResult::from_words(&self.call_words(&call.encode()))
    }
}

/// Physical memory, through the kernel's linear map, and the TLB of the current regime.
///
/// Every access may be refused: a page may be another's.
pub trait Memory {
    /// Copies bytes out of memory.
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Abort>;
    /// Copies bytes into memory.
    fn write(&self, address: u64, from: &[u8]) -> Result<(), Abort>;
    /// Loads a word; `address` is 8-byte aligned.
    fn load(&self, address: u64) -> Result<u64, Abort>;
    /// Stores a word; `address` is 8-byte aligned.
    fn store(&self, address: u64, value: u64) -> Result<(), Abort>;
    /// Fills a page with zeros.
    fn zero(&self, page: Pfn) -> Result<(), Abort>;
    /// Makes what was written to the page visible to instruction fetch.
    fn make_executable(&self, page: Pfn);
    /// Makes new table entries visible to the table walker.
    fn publish_tables(&self);
    /// Forgets the translations of one page of an address space, on every CPU.
    fn flush_page(&self, asid: u16, address: u64);
    /// Forgets all translations of an address space, on every CPU.
    fn flush_space(&self, asid: u16);
}

/// Which conduit a call to nowhere takes, for the research device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OddCall {
    /// `HVC #1`.
    Hvc1,
    /// `SMC #1`.
    Smc1,
}

/// A register of a feature that the hypervisor hides from everybody, or one that tells of such features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the architecture's names, without the level")]
pub enum Hidden {
    /// An identification register: S3_0_C0_C`crm`_`op2`.
    Identification {
        crm: u8,
        op2: u8,
    },
    Gcr,
    Rgsr,
    Tfsr,
    Tfsre0,
    Gmid,
    Zcr,
    Smcr,
    Svcr,
}

impl Hidden {
    /// Reads a word of a program's.
    pub const fn from_word(word: u64) -> Option<Self> {
        Some(match word {
            2 => Self::Gcr,
            3 => Self::Rgsr,
            4 => Self::Tfsr,
            5 => Self::Tfsre0,
            6 => Self::Gmid,
            7 => Self::Zcr,
            8 => Self::Smcr,
            9 => Self::Svcr,
            // CRm 1 to 7, op2 0 to 7.
            16..72 => Self::Identification { crm: (word >> 3) as u8 - 1, op2: word as u8 & 7 },
            _ => return None,
        })
    }
}

/// An instruction of the kernel that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undefined {
    /// ESR_EL1.
    pub esr: u64,
}

/// What is done between two reads of the virtual counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// Nothing: calibration.
    Nothing,
    /// 100 instructions that do nothing: calibration.
    Nops,
    /// A loop of 10,000 passes of two instructions: calibration.
    Loop,
    /// `HVC #0` with x0 to x6.
    Hvc,
    /// `SMC #0` with x0 to x6.
    Smc,
    /// A load through the linear map from the physical address in x0. What the kernel does about it is in the
    /// interval: compare two of them.
    Load,
}

impl Timed {
    /// Reads a word of a program's.
    pub const fn from_word(word: u64) -> Option<Self> {
        Some(match word {
            0 => Self::Nothing,
            1 => Self::Nops,
            2 => Self::Loop,
            3 => Self::Hvc,
            4 => Self::Smc,
            5 => Self::Load,
            _ => return None,
        })
    }
}

/// The whole machine.
pub trait Machine: Hypervisor + Memory {
    /// Nanoseconds since some point in the past; never goes back.
    fn now(&self) -> u64;
    /// Takes whatever interrupts are pending. Interrupts are masked otherwise.
    fn take_interrupts(&self);
    /// Waits for an interrupt (at the latest the next tick) and takes it.
    fn idle(&self);
    /// Writes bytes to the console, all of them before it returns.
    fn console(&self, bytes: &[u8]);
    /// Calls the firmware.
    fn smc(&self, words: [u64; 4]) -> [u64; 4];
    /// Makes a call with a non-zero immediate; returns x0.
    fn odd_call(&self, which: OddCall, words: &[u64; CALL_WORDS]) -> u64;
    /// Reads a register of a hidden feature.
    fn hidden(&self, which: Hidden) -> Result<u64, Undefined>;
    /// The CPUs but the boot CPU, in the device tree's order.
    fn secondaries(&self) -> &[Secondary];
    /// Asks the firmware to turn one of them on, by its place in that list; returns PSCI's answer.
    fn turn_on(&self, index: usize) -> u64;
    /// Whether the firmware knows it as off.
    fn is_off(&self, index: usize) -> bool;
    /// Wakes the CPUs that wait for work.
    fn wake(&self);
    /// Interrupts one of the CPUs, by its number: 0 is the boot CPU.
    fn kick(&self, cpu: usize);
    /// A moment's pause in a loop that waits for another CPU.
    fn relax(&self);
    /// Does one thing, without interruption; returns the ticks of the virtual counter and x0 to x9.
    fn timed(&self, what: Timed, words: &[u64; CALL_WORDS]) -> (u64, [u64; RESULT_WORDS]);
    /// What the virtual counter read at the kernel's first instruction.
    fn counter_at_entry(&self) -> u64;
    /// Runs EL0 in the address space of this root until its next exception, which is then in `context`.
    fn run_user(&self, context: &mut UserContext, root: Pfn, asid: u16);
    /// Reads the FP/SIMD registers of EL0.
    fn save_fp(&self, state: &mut FpState);
    /// Writes them.
    fn restore_fp(&self, state: &FpState);
    /// Sixteen bytes for `AT_RANDOM`; not a source of secrets.
    fn random(&self) -> [u8; 16];
}
