//! The guest itself.

use core::arch::global_asm;
use core::mem::offset_of;

use guest_stub::arch::{SYSTEM_COUNT, SYSTEM_REGISTERS, attempt, entry_record, system_registers};
use guest_stub::device::Device;
use guest_stub::protocol::{Command, DEVICE_BASE, DOORBELL, PAGE_SIZE, RAM_BASE, VALUE};
use guest_stub::{read_register, write_register};

/// General and vector registers, filled before an exit and read after it; layout known to the assembly.
#[repr(C, align(16))]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Registers {
    x: [u64; 32],
    v: [[u64; 2]; 32],
    fpcr: u64,
    fpsr: u64,
}

global_asm!(
    include_str!("round.S"),
    v = const offset_of!(Registers, v),
    value = const VALUE - DOORBELL,
);

unsafe extern "C" {
    fn deed_registers_round(filled: &Registers, seen: &mut Registers);
}

/// Rounds, each with its own phase, pattern and fresh page.
const ROUNDS: u64 = 3;
/// First page that the rounds touch.
const FRESH: u64 = RAM_BASE + 0x10_0000;
/// AHP, DN, FZ and RMode: bits of FPCR that every CPU has.
const FPCR: u64 = 0x07c0_0000;
/// QC and the cumulative exception bits.
const FPSR: u64 = 0x0800_009f;
/// CNTV_CTL_EL0.ISTATUS changes with time.
const CNTV_ISTATUS: u64 = 1 << 2;

pub(super) fn main(_argument: u64) {
    let mut device = Device::enrol();
    found_at_entry(&mut device);
    let mut pattern = Pattern(device.value(0));
    let (mut general, mut system, mut keys, mut thread) = (0, 0, 0, 0);
    for round in 0..ROUNDS {
        let filled_keys = fill_keys(&mut pattern);
        let filled_thread = fill_thread(&mut pattern);
        fill_system(&mut pattern);
        let filled_system = system_registers();
        let filled = filled(&mut pattern, round);
        let mut seen = filled;
        // The phase's number; the doorbell itself is rung with all registers full.
        guest_stub::arch::store64(DEVICE_BASE + guest_stub::protocol::DATA, round + 1);
        // SAFETY: the assembly keeps the C calling convention, reads `filled`, writes `seen` and the fresh page,
        // which is nobody's.
        unsafe { deed_registers_round(&filled, &mut seen) };
        system += different(&mut device, &filled_system, &system_registers());
        keys += u64::from(filled_keys != read_keys());
        thread += u64::from(filled_thread != read_thread());
        general += lost(&mut device, &filled, &seen);
    }
    device.check("general-and-vector-registers-survive-exits", 0, general);
    device.check("system-registers-survive-exits", 0, system);
    device.check("pointer-authentication-keys-survive-exits", 0, keys);
    device.check("tpidr2-el0-survives-exits-or-is-not-there", 0, thread);
}

/// A guest's pattern: never zero, different for every register, round and seed.
struct Pattern(u64);

impl Pattern {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.0 | 1
    }
}

/// What EL2 must have put there: zeros, and SCTLR_EL1's reset value.
fn found_at_entry(device: &mut Device) {
    let record = entry_record();
    let [_argument, rest @ ..] = record.general;
    let count = |words: &mut dyn Iterator<Item = u64>| words.filter(|word| *word != 0).count() as u64;
    device.check("general-registers-are-zero-at-entry", 0, count(&mut rest.into_iter()));
    device.check("vector-registers-are-zero-at-entry", 0, count(&mut record.vector.into_iter().flatten()));
    device.check("fpcr-and-fpsr-are-zero-at-entry", 0, count(&mut record.floating.into_iter()));
    let mut reset = [0; SYSTEM_COUNT];
    for (value, name) in reset.iter_mut().zip(SYSTEM_REGISTERS) {
        if *name == "sctlr_el1" {
            *value = 0x30d0_0800;
        }
    }
    let wrong = different(device, &reset, &record.system);
    device.check("system-registers-have-their-reset-values-at-entry", 0, wrong);
    device.check("pointer-authentication-keys-are-zero-at-entry", 0, count(&mut read_keys().into_iter()));
    device.check("tpidr2-el0-is-zero-at-entry-or-not-there", 0, read_thread());
}

/// Number of system registers that differ; each is named in a line for people, without its value.
fn different(device: &mut Device, before: &[u64; SYSTEM_COUNT], after: &[u64; SYSTEM_COUNT]) -> u64 {
    let mut count = 0;
    for ((name, old), new) in SYSTEM_REGISTERS.iter().zip(before).zip(after) {
        let mask = if *name == "cntv_ctl_el0" { !CNTV_ISTATUS } else { !0 };
        if (old ^ new) & mask != 0 {
            device.say(format_args!("{name} is not what it should be: {old:#x} and {new:#x}"));
            count += 1;
        }
    }
    count
}

fn lost(device: &mut Device, filled: &Registers, seen: &Registers) -> u64 {
    let mut count = 0;
    for (index, (old, new)) in filled.x.iter().zip(&seen.x).enumerate().take(31) {
        // x0 has taken the value of the load, which is value 0; the caller's seed.
        if index != 0 && old != new {
            device.say(format_args!("x{index} is lost: {old:#x} is now {new:#x}"));
            count += 1;
        }
    }
    for (index, (old, new)) in filled.v.iter().zip(&seen.v).enumerate() {
        if old != new {
            device.say(format_args!("v{index} is lost"));
            count += 1;
        }
    }
    let loaded = device.value(0);
    count + u64::from(seen.x[0] != loaded) + u64::from((seen.fpcr, seen.fpsr) != (filled.fpcr, filled.fpsr))
}

/// x0 is the doorbell's address, x1 a page that is not there yet, x2 the command; the others are the pattern.
fn filled(pattern: &mut Pattern, round: u64) -> Registers {
    let mut registers = Registers { x: [0; 32], v: [[0; 2]; 32], fpcr: FPCR, fpsr: FPSR };
    registers.x.fill_with(|| pattern.next());
    registers.v.fill_with(|| [pattern.next(), pattern.next()]);
    registers.x[0] = DEVICE_BASE + DOORBELL;
    registers.x[1] = FRESH + round * PAGE_SIZE;
    registers.x[2] = Command::Phase as u64;
    registers
}

/// Fills the system registers that the guest itself does not need.
fn fill_system(pattern: &mut Pattern) {
    write_register!("ttbr1_el1", pattern.next() & 0xffff_ffff_f000);
    write_register!("afsr0_el1", pattern.next());
    write_register!("afsr1_el1", pattern.next());
    write_register!("far_el1", pattern.next());
    write_register!("esr_el1", pattern.next() & 0xffff_ffff);
    write_register!("amair_el1", pattern.next());
    write_register!("contextidr_el1", pattern.next() & 0xffff_ffff);
    write_register!("cntkctl_el1", pattern.next() & 0x3ff);
    write_register!("par_el1", pattern.next() & 0xffff_ffff_f001);
    write_register!("tpidr_el1", pattern.next());
    write_register!("tpidr_el0", pattern.next());
    write_register!("tpidrro_el0", pattern.next());
    write_register!("sp_el0", pattern.next());
    write_register!("elr_el1", pattern.next() & !3);
    write_register!("spsr_el1", pattern.next() & 0xf000_03c0);
    write_register!("csselr_el1", pattern.next() & 2);
    write_register!("cntv_cval_el0", pattern.next());
    write_register!("cntv_ctl_el0", 3);
    write_register!("mair_el1", read_register!("mair_el1") & 0xffff | pattern.next() << 16);
}

/// ID_AA64ISAR1_EL1: APA and API say whether the CPU has address authentication.
fn has_keys() -> bool {
    read_register!("s3_0_c0_c6_1") & 0xff0 != 0
}

/// Number of 64-bit halves of the keys IA, IB, DA and DB.
const KEY_WORDS: usize = 8;

fn fill_keys(pattern: &mut Pattern) -> [u64; KEY_WORDS] {
    if has_keys() {
        write_register!("s3_0_c2_c1_0", pattern.next());
        write_register!("s3_0_c2_c1_1", pattern.next());
        write_register!("s3_0_c2_c1_2", pattern.next());
        write_register!("s3_0_c2_c1_3", pattern.next());
        write_register!("s3_0_c2_c2_0", pattern.next());
        write_register!("s3_0_c2_c2_1", pattern.next());
        write_register!("s3_0_c2_c2_2", pattern.next());
        write_register!("s3_0_c2_c2_3", pattern.next());
    }
    read_keys()
}

fn read_keys() -> [u64; KEY_WORDS] {
    if !has_keys() {
        return [0; KEY_WORDS];
    }
    [
        read_register!("s3_0_c2_c1_0"),
        read_register!("s3_0_c2_c1_1"),
        read_register!("s3_0_c2_c1_2"),
        read_register!("s3_0_c2_c1_3"),
        read_register!("s3_0_c2_c2_0"),
        read_register!("s3_0_c2_c2_1"),
        read_register!("s3_0_c2_c2_2"),
        read_register!("s3_0_c2_c2_3"),
    ]
}

/// TPIDR2_EL0, which a CPU with SME has and which cannot be trapped everywhere; 0 where it is UNDEFINED.
fn read_thread() -> u64 {
    attempt(|| read_register!("s3_3_c13_c0_5")).unwrap_or(0)
}

fn fill_thread(pattern: &mut Pattern) -> u64 {
    let value = pattern.next();
    // Where it is UNDEFINED nothing is written, and 0 is read back.
    let _ = attempt(|| write_register!("s3_3_c13_c0_5", value));
    read_thread()
}
