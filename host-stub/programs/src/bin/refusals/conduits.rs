//! Calls that do not exist, and conduits that lead nowhere.

use abi::smccc::{self, NOT_SUPPORTED};
use abi::{host, psci};
use host_programs::Failure;
use host_programs::deed::Deed;
use host_programs::hostile::{self, Expected, Refusal, Watch, raw_refusal};
use host_programs::steps::Steps;

/// Function ids that are no host calls: beside the known ones, guests' calls, other services, other conventions.
const UNKNOWN: [(&str, u64); 10] = [
    ("hvc-of-function-0-is-no-call", 0),
    ("hvc-of-all-ones-is-no-call", u64::MAX),
    ("hvc-before-the-first-call-is-no-call", host::FIRST as u64 - 1),
    ("hvc-behind-the-last-call-is-no-call", host::FIRST as u64 + 0x19),
    ("hvc-behind-the-test-calls-is-no-call", host::FIRST as u64 + 0xf7),
    ("hvc-of-a-host-call-as-32-bit-call-is-no-call", host::FIRST as u64 & !(1 << 30)),
    ("hvc-of-a-host-call-as-yielding-call-is-no-call", host::FIRST as u64 & !(1 << 31)),
    ("hvc-of-a-guests-call-is-no-call", abi::guest::MEM_SHARE as u64),
    ("hvc-of-a-stub-call-of-linux-is-no-call", 2),
    ("hvc-of-a-service-of-firmware-is-no-call", 0x8200_0000),
];

/// SMCs that are the firmware's, of which QEMU's knows none.
const FIRMWARES: [(&str, u64); 3] = [
    ("qemus-firmware-has-no-random-numbers", smccc::TRNG_VERSION as u64),
    ("qemus-firmware-gives-no-random-number", smccc::TRNG_RND as u64),
    ("qemus-firmware-has-no-workaround", smccc::ARCH_WORKAROUND_1 as u64),
];

/// SMCs that must not reach firmware.
const FORBIDDEN: [(&str, u64); 6] = [
    ("smc-of-ff-a-is-not-supported", 0x8400_0063),
    ("smc-of-sdei-is-not-supported", 0xc400_0020),
    ("smc-of-a-silicon-service-is-not-supported", 0x8200_0000),
    ("smc-of-a-trusted-os-is-not-supported", 0xb200_ff01),
    ("smc-of-a-host-call-is-not-supported", host::FIRST as u64),
    ("smc-of-psci-memory-protection-is-not-supported", 0x8400_0013),
];

pub(crate) fn try_all(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let rows = UNKNOWN.map(|(name, number)| unknown(name, number));
    hostile::try_all(deed, steps, &Watch::new(&[]), &rows)?;

    let version = u64::from(host::FIRST);
    steps.equal_hex("hvc-1-is-no-call", NOT_SUPPORTED, deed.odd_immediate(1, version)?);
    steps.equal_hex("smc-1-is-no-call", NOT_SUPPORTED, deed.odd_immediate(2, u64::from(psci::VERSION))?);
    for (name, function) in FIRMWARES.into_iter().chain(FORBIDDEN) {
        let [x0, ..] = deed.smc([function, 0, 0, 0])?;
        steps.equal_hex(name, NOT_SUPPORTED, x0);
    }

    let smc = |function: u32, argument: u32| -> Result<u64, Failure> {
        let [x0, ..] = deed.smc([u64::from(function), u64::from(argument), 0, 0])?;
        Ok(x0)
    };
    steps.equal_hex("psci-version", psci::VERSION_1_1, smc(psci::VERSION, 0)?);
    steps.equal_hex("psci-can-turn-the-system-off", psci::SUCCESS, smc(psci::FEATURES, psci::SYSTEM_OFF)?);
    steps.equal_hex("psci-has-no-unknown-function", psci::NOT_SUPPORTED, smc(psci::FEATURES, 0x8400_001f)?);
    steps.equal_hex("smccc-version", smccc::VERSION_1_1, smc(smccc::VERSION, 0)?);
    steps.equal_hex("smccc-has-no-unknown-feature", NOT_SUPPORTED, smc(smccc::ARCH_FEATURES, 0x8000_8001)?);
    let rubbish = 0xdead_beef_0000_0000 | u64::from(host::FIRST);
    let [x0, x1, ..] = deed.call_words([rubbish, 0, 0, 0, 0, 0, 0])?;
    steps.equal_hex("rubbish-above-the-function-id-is-no-part-of-it", 0, x0 | x1);
    Ok(())
}

fn unknown(name: &'static str, number: u64) -> Refusal {
    raw_refusal(name, [number, 1, 1, 1, 1, 1, 1], Expected::NotSupported)
}
