//! Registers of features that nobody has, as the host's kernel finds them.

use host_programs::Failure;
use host_programs::deed::Deed;
use host_programs::steps::{Steps, format};

/// The number of an identification register of CRm `crm` and op2 `op2`.
const fn number(crm: u64, op2: u64) -> u64 {
    (crm + 1) << 3 | op2
}
/// ID_AA64PFR0_EL1 and ID_AA64PFR1_EL1.
const PFR0: u64 = number(4, 0);
const PFR1: u64 = number(4, 1);
/// ID_AA64ZFR0_EL1 and ID_AA64SMFR0_EL1: SVE and SME in detail.
const IN_DETAIL: [u64; 2] = [number(4, 4), number(4, 5)];
/// ESR of an instruction that does not exist: class 0, 32 bits, nothing else.
const ESR_UNDEFINED: u64 = 1 << 25;
/// What must not be there, by its number.
const UNDEFINED: [(&str, u64); 8] = [
    ("gcr-el1", 2),
    ("rgsr-el1", 3),
    ("tfsr-el1", 4),
    ("tfsre0-el1", 5),
    ("gmid-el1", 6),
    ("zcr-el1", 7),
    ("smcr-el1", 8),
    ("svcr", 9),
];

pub(crate) fn read_all(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("The host's kernel asks for features that the hypervisor hides, and reads their registers.");
    for (name, register, shift) in [("sve", PFR0, 32), ("mte", PFR1, 8), ("sme", PFR1, 24)] {
        let field = deed.hidden(register)?.map(|value| value >> shift & 0xf);
        let step = format(format_args!("the-host-is-told-of-no-{name}"));
        steps.check(&step, "0", format(format_args!("{field:x?}")), field == Ok(0));
    }
    // All of that space can be read, allocated or not.
    let mut wrong = 0;
    for register in number(1, 0)..=number(7, 7) {
        let found = deed.hidden(register)?;
        let is_right = found.is_ok_and(|value| value == 0 || !IN_DETAIL.contains(&register));
        wrong += u64::from(!is_right);
    }
    steps.equal("every-identification-register-can-be-read", 0, wrong);
    for (name, register) in UNDEFINED {
        let step = format(format_args!("{name}-is-undefined-for-the-host"));
        let found = deed.hidden(register)?;
        let expected = Err(ESR_UNDEFINED);
        let show = |what: Result<u64, u64>| format(format_args!("{what:x?}"));
        steps.check(&step, show(expected), show(found), found == expected);
    }
    Ok(())
}
