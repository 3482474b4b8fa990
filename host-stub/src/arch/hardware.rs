//! The traits of [`crate::machine`], on the real machine.

use core::arch::asm;
use core::sync::atomic::{AtomicU8, Ordering};

use aarch64_cpu::registers::{Readable, TTBR0_EL1, Writeable};

use abi::host::{CALL_WORDS, RESULT_WORDS};
use abi::psci;

use super::{call, console, gic, hidden, linear, secondaries, smp, timed, timer};
use crate::machine::{Abort, Hidden, Hypervisor, Machine, Memory, OddCall, Timed, Undefined};
use crate::mm::Pfn;
use crate::platform::Conduit;
use crate::process::context::{FpState, UserContext};
use crate::secondary::Secondary;

unsafe extern "C" {
    fn enter_user(context: *mut UserContext);
    fn save_fp(state: *mut FpState);
    fn restore_fp(state: *const FpState);
}

/// How PSCI is called: 0 not at all, 1 SMC, 2 HVC.
static CONDUIT: AtomicU8 = AtomicU8::new(1);

/// Notes how PSCI is called.
pub fn set_conduit(conduit: Option<Conduit>) {
    let number = match conduit {
        None => 0,
        Some(Conduit::Smc) => 1,
        Some(Conduit::Hvc) => 2,
    };
    CONDUIT.store(number, Ordering::Relaxed);
}

/// Makes a PSCI call; `NOT_SUPPORTED` where there is no PSCI.
pub fn psci_call(function: u32, arguments: [u64; 3]) -> u64 {
    match CONDUIT.load(Ordering::Relaxed) {
        1 => call::psci(Conduit::Smc, function, arguments),
        2 => call::psci(Conduit::Hvc, function, arguments),
        _ => abi::smccc::NOT_SUPPORTED,
    }
}

/// Turns the machine off. Where that does not work, this CPU stops.
pub fn power_off() -> ! {
    psci_call(psci::SYSTEM_OFF, [0; 3]);
    loop {
        aarch64_cpu::asm::wfe();
    }
}

/// The machine that this kernel runs on.
#[derive(Debug)]
pub struct Hardware;

impl Hypervisor for Hardware {
    fn call_words(&self, words: &[u64; CALL_WORDS]) -> [u64; RESULT_WORDS] {
        call::hvc(words)
    }
}

impl Memory for Hardware {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Abort> {
        linear::read(address, into)
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<(), Abort> {
        linear::write(address, from)
    }

    fn load(&self, address: u64) -> Result<u64, Abort> {
        linear::load(address)
    }

    fn store(&self, address: u64, value: u64) -> Result<(), Abort> {
        linear::store(address, value)
    }

    fn zero(&self, page: Pfn) -> Result<(), Abort> {
        linear::zero(page)
    }

    fn make_executable(&self, page: Pfn) {
        linear::make_executable(page);
    }

    fn publish_tables(&self) {
        // SAFETY: barriers change no value.
        unsafe { asm!("dsb ishst", "isb", options(nostack)) };
    }

    fn flush_page(&self, asid: u16, address: u64) {
        smp::shoot_down(u64::from(asid) << 48 | (address >> 12 & 0xfff_ffff_ffff), false);
    }

    fn flush_space(&self, asid: u16) {
        smp::shoot_down(u64::from(asid) << 48, true);
    }
}

impl Machine for Hardware {
    fn now(&self) -> u64 {
        timer::now()
    }

    fn take_interrupts(&self) {
        while let Some(number) = gic::acknowledge() {
            if number == gic::TIMER {
                timer::arm();
            }
            gic::end(number);
        }
    }

    fn idle(&self) {
        // A pending interrupt ends the wait although it is masked.
        aarch64_cpu::asm::wfi();
        self.take_interrupts();
    }

    fn console(&self, bytes: &[u8]) {
        console::write(bytes);
    }

    fn smc(&self, words: [u64; 4]) -> [u64; 4] {
        call::smc(words)
    }

    fn odd_call(&self, which: OddCall, words: &[u64; CALL_WORDS]) -> u64 {
        call::odd(which, words)
    }

    fn hidden(&self, which: Hidden) -> Result<u64, Undefined> {
        hidden::read(which)
    }

    fn secondaries(&self) -> &[Secondary] {
        secondaries::all()
    }

    fn turn_on(&self, index: usize) -> u64 {
        secondaries::turn_on(index)
    }

    fn is_off(&self, index: usize) -> bool {
        secondaries::is_off(index)
    }

    fn wake(&self) {
        aarch64_cpu::asm::sev();
    }

    fn kick(&self, cpu: usize) {
        smp::kick(cpu);
    }

    fn relax(&self) {
        // SAFETY: a hint: it changes nothing. `core`'s hint for this is ISB on Arm, which does not let the other CPU go
        // on where one CPU of an emulator runs at a time.
        unsafe { asm!("yield", options(nomem, nostack, preserves_flags)) };
    }

    fn timed(&self, what: Timed, words: &[u64; CALL_WORDS]) -> (u64, [u64; RESULT_WORDS]) {
        timed::timed(what, words)
    }

    fn counter_at_entry(&self) -> u64 {
        timed::at_entry()
    }

    fn run_user(&self, context: &mut UserContext, root: Pfn, asid: u16) {
        let tables = u64::from(asid) << 48 | root.address();
        if TTBR0_EL1.get() != tables {
            TTBR0_EL1.set(tables);
            aarch64_cpu::asm::barrier::isb(aarch64_cpu::asm::barrier::SY);
        }
        // SAFETY: the context says EL0 (it is made by `UserContext::new` or sanitised), so what runs until
        // the next exception has only what its tables grant it; the assembly keeps the C convention.
        unsafe { enter_user(context) };
    }

    fn save_fp(&self, state: &mut FpState) {
        // SAFETY: a barrier changes no value. Cache maintenance that a thread has begun here must be complete before it
        // goes on elsewhere: its own barrier there would not wait for it.
        unsafe { asm!("dsb ish", options(nostack)) };
        // SAFETY: writes 528 bytes, the size of the structure, which is 16-byte aligned.
        unsafe { save_fp(state) };
    }

    fn restore_fp(&self, state: &FpState) {
        // SAFETY: reads the structure; this kernel is compiled without FP/SIMD, so no register of its is lost.
        unsafe { restore_fp(state) };
    }

    fn random(&self) -> [u8; 16] {
        let mut state = timer::now() | 1;
        let mut bytes = [0; 16];
        for byte in &mut bytes {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        bytes
    }
}
