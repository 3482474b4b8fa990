//! How often CPUs entered EL2 while Linux ran, and why, by QEMU's log of exceptions (`-d int`).
//!
//! `qemu/linux/init` touches the hypervisor's memory first, sleeps for a second, and touches it again: those two aborts
//! tell the boot from an idle second, and that from what comes after.

use crate::console::Console;
use crate::report::Check;
use std::fmt;
use std::path::Path;

/// `ESR_EL2.EC` of calls, and of an access to a system register.
const HVC: u64 = 0x16;
const SMC: u64 = 0x17;
const REGISTER: u64 = 0x18;
/// Bits of `ESR_EL2.ISS` that name such a register and say whether it is read, without the number of the target (Arm ARM
/// D24.2.37, ISS encoding for an exception from MSR, MRS): op0, op1 and CRn, and the direction.
const GROUP_AND_DIRECTION: u64 = 3 << 20 | 7 << 14 | 15 << 10 | 1;
/// A read of S3_0_C0_*: the identification registers.
const IDENTIFICATION: u64 = 3 << 20 | 1;
/// The phases, in turn.
const PHASES: [&str; 3] = ["until the first program", "in an idle second", "after it"];

/// Makes QEMU write what `check` reads.
pub(crate) fn qemu_options(log: &Path) -> Vec<String> {
    ["-d", "int", "-D", &log.to_string_lossy()].map(str::to_owned).to_vec()
}

/// The entries of a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entries {
    calls: usize,
    firmware_calls: usize,
    /// Reads of identification registers, which Deed answers on CPUs with features that it hides.
    identifications: usize,
    others: usize,
}

impl Entries {
    fn is_none(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let aborts = if self.others == 1 { "abort" } else { "aborts" };
        let all = [
            (self.calls, "HVC"),
            (self.firmware_calls, "SMC"),
            (self.identifications, "reads of identification registers"),
            (self.others, aborts),
        ];
        let words: Vec<String> = all
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, name)| format!("{count} {name}"))
            .collect();
        f.write_str(if words.is_empty() { "none" } else { "" })?;
        f.write_str(&words.join(", "))
    }
}

/// Checks that Linux entered EL2 by calls, by reads of identification registers where there is something to hide, and by
/// as many aborts as the verdict says that it was told of: no stage-2 fault that it did not cause itself, no other trap; and
/// not at all while it was idle.
pub(crate) fn check(log: &str, console: &Console) -> Check {
    let phases = phases(log);
    let aborts = console.facts("verdict ").and_then(|words| words.get("aborts")?.parse().ok());
    let others: usize = phases.iter().map(|phase| phase.others).sum();
    let told: Vec<String> =
        phases.iter().zip(PHASES).map(|(entries, phase)| format!("{entries} {phase}")).collect();
    let [boot, idle, _] = phases;
    let pass = Some(others) == aborts && boot.firmware_calls > 0 && idle.is_none();
    Check::new("entries", "calls, the verdict's aborts, and none while idle", told.join("; "), pass)
}

/// Counts the entries of each phase. The second touch belongs to the third.
fn phases(log: &str) -> [Entries; PHASES.len()] {
    let mut phases = [Entries::default(); PHASES.len()];
    let (mut phase, mut touches, mut is_entry) = (0, 0, false);
    for line in log.lines() {
        if line.starts_with("...from ") {
            is_entry = line.ends_with(" to EL2");
        } else if let Some((class, iss)) = syndrome_of(line).filter(|_| is_entry) {
            is_entry = false;
            match class {
                HVC => phases[phase].calls += 1,
                SMC => phases[phase].firmware_calls += 1,
                REGISTER if iss & GROUP_AND_DIRECTION == IDENTIFICATION => {
                    phases[phase].identifications += 1;
                }
                _ => {
                    touches += 1;
                    phase = usize::min(touches, PHASES.len() - 1);
                    // The first touch ends the boot, and is no part of the second that follows.
                    let counted = if touches == 1 { 0 } else { phase };
                    phases[counted].others += 1;
                }
            }
        }
    }
    phases
}

/// Class and specific syndrome of an exception: `...with ESR 0x17/0x5e000000`.
fn syndrome_of(line: &str) -> Option<(u64, u64)> {
    let (class, syndrome) = line.strip_prefix("...with ESR 0x")?.split_once("/0x")?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(class)?, number(syndrome)? & 0x1ff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ID_AA64PFR0_EL1, and SCTLR_EL1.
    const PFR0: u64 = 0x6230_0009;
    const SCTLR: u64 = 0x6230_0401;

    fn exception(from: u8, to: u8, class: u64) -> String {
        register(from, to, class, if class == REGISTER { PFR0 } else { 0x5e00_0000 })
    }

    fn register(from: u8, to: u8, class: u64, esr: u64) -> String {
        format!(
            "Taking exception 1 [x] on CPU 0\n...from EL{from} to EL{to}\n...with ESR {class:#x}/{esr:#x}\n\
             ...with ELR 0x1\n...to EL{to} PC 0x1 PSTATE 0x3c9\n"
        )
    }

    fn log(entries: &[u64]) -> String {
        // Between them, what does not concern EL2: a program's fault, and an interrupt, which has no ESR.
        let between = exception(0, 1, 0x24) + "Taking exception 5 [IRQ] on CPU 1\n...from EL1 to EL1\n";
        entries.iter().map(|class| exception(1, 2, *class) + &between).collect()
    }

    fn judge(entries: &[u64], aborts: usize) -> Check {
        check(&log(entries), &Console::parse(&format!("[deed] verdict nonce=1 reason=off aborts={aborts}\n")))
    }

    #[test]
    fn entries_are_told_by_cause_and_phase() {
        let check = judge(&[SMC, REGISTER, SMC, 0x24, 0x24, SMC, HVC, 0x24], 3);
        assert!(check.pass, "{}", check.complaint());
        assert_eq!(
            check.observed,
            "2 SMC, 1 reads of identification registers, 1 abort until the first program; none in an idle second; 1 HVC, 1 SMC, 2 aborts after it"
        );
    }

    #[test]
    fn a_fault_or_a_trap_that_the_host_was_not_told_of_fails() {
        assert!(judge(&[SMC, 0x24, 0x24], 2).pass);
        for traps in [&[SMC, 0x24, 0x24, 0x01][..], &[SMC, 0x20, 0x24, 0x24], &[0x24, 0x24]] {
            assert!(!judge(traps, 2).pass, "{traps:x?}");
        }
        let trap = log(&[SMC, 0x24, 0x24]) + &register(1, 2, REGISTER, SCTLR);
        assert!(!check(&trap, &Console::parse("[deed] verdict nonce=1 reason=off aborts=2\n")).pass);
    }

    #[test]
    fn a_call_while_idle_fails() {
        assert!(!judge(&[SMC, 0x24, SMC, 0x24], 2).pass);
    }
}
