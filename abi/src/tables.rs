//! The interface as data, beside [`crate::host::CALLS`]: for documents, tools, and test suites written elsewhere. No
//! image refers to any of it, so none contains it.

use crate::error::Error;
use crate::error::Error::{Again, Busy, Exists, Invalid, NoEntry, NoMemory, Permission, Range};
use crate::{guest, psci, smccc};

/// What a host call can be refused with, by its name in [`crate::host::CALLS`].
///
/// What a word alone can be refused with counts too: any call with a handle answers `NoEntry` to a word that is none.
pub const REFUSALS: &[(&str, &[Error])] = &[
    ("VERSION", &[]),
    ("POOL_TOPUP", &[Permission, NoMemory, Invalid]),
    ("VM_TOPUP", &[Permission, NoEntry, NoMemory, Invalid]),
    ("SHARE_HYP", &[Permission, NoMemory, Invalid]),
    ("UNSHARE_HYP", &[Permission, NoMemory, Busy, Invalid]),
    ("DONATE_GUEST", &[Permission, NoEntry, NoMemory, Invalid, Range]),
    ("SHARE_GUEST", &[Permission, NoEntry, NoMemory, Busy, Invalid, Range]),
    ("UNSHARE_GUEST", &[Permission, NoEntry, NoMemory, Invalid, Range]),
    ("RECLAIM_GUEST", &[Permission, NoEntry, NoMemory, Invalid, Range]),
    ("QUERY_PAGE", &[Invalid]),
    ("FORCE_RECLAIM", &[Permission, Again, NoMemory, Invalid]),
    ("VM_CREATE", &[Permission, NoMemory, Busy, Invalid]),
    ("VCPU_CREATE", &[Permission, NoEntry, NoMemory, Exists, Invalid]),
    ("VCPU_SET_BOOT", &[Permission, NoEntry, Busy, Exists, Invalid]),
    ("VCPU_RUN", &[Permission, NoEntry, Again, Busy]),
    ("VCPU_GET_REG", &[Permission, NoEntry, Busy, Invalid]),
    ("VCPU_SET_REG", &[Permission, NoEntry, Busy, Invalid]),
    ("UNSHARE_ACK", &[Permission, NoEntry, NoMemory, Busy]),
    ("VM_TEARDOWN_START", &[Permission, NoEntry, Busy]),
    ("VM_TEARDOWN_FINISH", &[Permission, NoEntry, NoMemory, Busy]),
    ("TEST_PAGE", &[Invalid]),
    ("TEST_CENSUS", &[]),
    ("TEST_PIN", &[Permission, NoMemory, Busy, Invalid]),
    ("TEST_UNPIN", &[Permission, Invalid]),
    ("TEST_COUNTERS", &[]),
    ("TEST_EVENTS", &[]),
    ("TEST_FAIL", &[Invalid]),
];

/// What a host call of this name can be refused with; `None` if there is no such call.
pub fn refusals(call: &str) -> Option<&'static [Error]> {
    REFUSALS.iter().find(|(name, _)| *name == call).map(|(_, errors)| *errors)
}

/// A function of a guest's, or an SMC of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Function id.
    pub number: u32,
    /// Name in documents.
    pub name: &'static str,
    /// Names of x1, x2, ...
    pub arguments: &'static [&'static str],
    /// Names of x1, x2, ... of the result, x0 being its status or value.
    pub results: &'static [&'static str],
}

const fn function(
    number: u32,
    name: &'static str,
    arguments: &'static [&'static str],
    results: &'static [&'static str],
) -> Function {
    Function { number, name, arguments, results }
}

/// x1 to x3 of a call about a range of guest pages; x1 of its result is `done`.
const RANGE: &[&str] = &["ipa", "pages", "zero"];

/// The calls of a guest.
pub const GUEST_CALLS: &[Function] = &[
    function(smccc::VERSION, "SMCCC_VERSION", &[], &[]),
    function(smccc::ARCH_FEATURES, "SMCCC_ARCH_FEATURES", &["function"], &[]),
    function(smccc::VENDOR_HYP_UID, "call UID", &[], &["uid1", "uid2", "uid3"]),
    function(guest::FEATURES, "FEATURES", &[], &[]),
    function(guest::PTP, "PTP", &["x1", "x2", "x3", "x4", "x5", "x6"], &["x1", "x2", "x3"]),
    function(guest::HYP_MEMINFO, "HYP_MEMINFO", &["zero", "zero", "zero"], &["ranges"]),
    function(guest::MEM_SHARE, "MEM_SHARE", RANGE, &["done"]),
    function(guest::MEM_UNSHARE, "MEM_UNSHARE", RANGE, &["done"]),
    function(guest::MMIO_GUARD_INFO, "MMIO_GUARD_INFO", &["zero", "zero", "zero"], &[]),
    function(guest::MMIO_GUARD_ENROLL, "MMIO_GUARD_ENROLL", &[], &[]),
    function(guest::MMIO_GUARD_MAP, "MMIO_GUARD_MAP", RANGE, &["done"]),
    function(guest::MMIO_GUARD_UNMAP, "MMIO_GUARD_UNMAP", RANGE, &["done"]),
    function(guest::MEM_RELINQUISH, "MEM_RELINQUISH", RANGE, &["done"]),
];

/// The power calls of a guest.
pub const GUEST_PSCI: &[Function] = &[
    function(psci::VERSION, "PSCI_VERSION", &[], &[]),
    function(psci::FEATURES, "PSCI_FEATURES", &["function"], &[]),
    function(psci::MIGRATE_INFO_TYPE, "MIGRATE_INFO_TYPE", &[], &[]),
    function(psci::CPU_ON, "CPU_ON", &["affinity", "entry", "context"], &[]),
    function(psci::CPU_OFF, "CPU_OFF", &[], &[]),
    function(psci::CPU_SUSPEND, "CPU_SUSPEND", &["state", "entry", "context"], &[]),
    function(psci::AFFINITY_INFO, "AFFINITY_INFO", &["affinity", "level"], &[]),
    function(psci::SYSTEM_OFF, "SYSTEM_OFF", &[], &[]),
    function(psci::SYSTEM_RESET, "SYSTEM_RESET", &[], &[]),
    function(psci::SYSTEM_RESET2, "SYSTEM_RESET2", &["type", "cookie"], &[]),
];

/// The SMCs of the host that are not NOT_SUPPORTED.
pub const HOST_SMCS: &[Function] = &[
    function(smccc::VERSION, "SMCCC_VERSION", &[], &[]),
    function(smccc::ARCH_FEATURES, "SMCCC_ARCH_FEATURES", &["function"], &[]),
    function(smccc::ARCH_WORKAROUND_1, "SMCCC_ARCH_WORKAROUND_1", &[], &[]),
    function(smccc::ARCH_WORKAROUND_2, "SMCCC_ARCH_WORKAROUND_2", &["enable"], &[]),
    function(smccc::ARCH_WORKAROUND_3, "SMCCC_ARCH_WORKAROUND_3", &[], &[]),
    function(smccc::TRNG_VERSION, "TRNG_VERSION", &[], &[]),
    function(smccc::TRNG_FEATURES, "TRNG_FEATURES", &["function"], &[]),
    function(smccc::TRNG_GET_UUID, "TRNG_GET_UUID", &[], &["uuid1", "uuid2", "uuid3"]),
    function(smccc::TRNG_RND, "TRNG_RND", &["bits"], &["high", "middle", "low"]),
    function(psci::VERSION, "PSCI_VERSION", &[], &[]),
    function(psci::FEATURES, "PSCI_FEATURES", &["function"], &[]),
    function(psci::MIGRATE_INFO_TYPE, "MIGRATE_INFO_TYPE", &[], &[]),
    function(psci::CPU_ON, "CPU_ON", &["affinity", "entry", "context"], &[]),
    function(psci::CPU_OFF, "CPU_OFF", &[], &[]),
    function(psci::CPU_SUSPEND, "CPU_SUSPEND", &["state", "entry", "context"], &[]),
    function(psci::AFFINITY_INFO, "AFFINITY_INFO", &["affinity", "level"], &[]),
    function(psci::SYSTEM_OFF, "SYSTEM_OFF", &[], &[]),
    function(psci::SYSTEM_RESET, "SYSTEM_RESET", &[], &[]),
];

/// Exits of VCPU_RUN by their reason: name, and names of x3, x4, ...
pub const EXITS: &[(&str, &[&str])] = &[
    ("Interrupted", &[]),
    ("Wait", &["event"]),
    ("MissingPage", &["ipa", "access"]),
    ("Mmio", &["ipa", "size", "write", "value"]),
    ("Unshare", &["ipa", "pages"]),
    ("NeedPages", &["pool", "pages"]),
    ("GuestCall", &["x0", "x1", "x2", "x3", "x4", "x5", "x6"]),
    ("SystemOff", &[]),
    ("SystemReset", &[]),
    ("CpuOn", &["vcpu"]),
    ("CpuOff", &[]),
    ("SError", &[]),
    ("Fatal", &["why"]),
];

/// Words that stand for something: the argument or result, and its values by name.
pub const WORDS: &[(&str, &[(&str, u64)])] = &[
    ("features", &[("test_calls", crate::host::FEATURE_TEST_CALLS)]),
    ("pool", &[("tables", 0), ("metadata", 1), ("vm", 2)]),
    ("permissions", &[("write", 1), ("execute", 2)]),
    ("state", &[("no_page", 0), ("owned", 1), ("shared_owned", 2), ("shared_borrowed", 3)]),
    ("flags", &[("protected", 1), ("unshare_immediate", 2), ("mmio_unguarded", 4)]),
    ("owner", &[("host", 0), ("hyp", 1), ("guest", 2)]),
    ("access", &[("read", 0), ("write", 1), ("execute", 2)]),
    ("kind", &[("none", 0), ("write", 1), ("drop_stage2", 2), ("retire", 3), ("drop_hyp", 4), ("wipe", 5)]),
    ("why", &[("aarch32", 0), ("unexpected", 1)]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Exit;
    use crate::exit::{Access, EXIT_WORDS, Fatal};
    use crate::host::{CALLS, EventKind};
    use crate::page::{HostState, OwnerKind, Permissions, Pool, VmFlags};

    #[test]
    fn every_host_call_has_one_row_of_refusals_in_the_order_of_the_calls() {
        assert!(CALLS.iter().map(|call| call.name).eq(REFUSALS.iter().map(|(name, _)| *name)));
        assert_eq!(refusals("QUERY_PAGE"), Some(&[Invalid][..]));
        assert_eq!(refusals("NO_CALL"), None);
    }

    #[test]
    fn every_exit_has_as_many_data_as_its_row() {
        for (reason, (name, data)) in EXITS.iter().enumerate() {
            // A word that is no datum does not survive.
            let mut words = [1; EXIT_WORDS];
            words[0] = reason as u64;
            let exit = Exit::from_words(words).expect(name);
            let expected = core::array::from_fn(|word| match word {
                0 => reason as u64,
                word => u64::from(word <= data.len()),
            });
            assert_eq!(exit.to_words(), expected, "{name}");
        }
        assert_eq!(Exit::from_words([EXITS.len() as u64, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn words_are_those_of_the_types() {
        let value = |word: &str, name: &str| {
            let (_, values) = WORDS.iter().find(|(known, _)| *known == word).unwrap();
            values.iter().find(|(known, _)| *known == name).unwrap().1
        };
        for (name, pool) in [("tables", Pool::Tables), ("metadata", Pool::Metadata), ("vm", Pool::Vm)] {
            assert_eq!(value("pool", name), pool as u64);
        }
        for (name, state) in [
            ("no_page", HostState::NoPage),
            ("owned", HostState::Owned),
            ("shared_owned", HostState::SharedOwned),
            ("shared_borrowed", HostState::SharedBorrowed),
        ] {
            assert_eq!(value("state", name), state as u64);
        }
        for (name, owner) in [("host", OwnerKind::Host), ("hyp", OwnerKind::Hyp), ("guest", OwnerKind::Guest)]
        {
            assert_eq!(value("owner", name), owner as u64);
        }
        for (name, access) in [("read", Access::Read), ("write", Access::Write), ("execute", Access::Execute)]
        {
            assert_eq!(value("access", name), access as u64);
        }
        for kind in [EventKind::Write, EventKind::DropStage2, EventKind::DropHyp, EventKind::Wipe] {
            assert_eq!(EventKind::from_word(kind as u64), Some(kind));
        }
        assert_eq!(value("kind", "retire"), EventKind::Retire as u64);
        assert_eq!(value("why", "unexpected"), Fatal::Unexpected as u64);
        assert_eq!(value("permissions", "write"), Permissions { write: true, execute: false }.to_word());
        assert_eq!(value("permissions", "execute"), Permissions { write: false, execute: true }.to_word());
        let flag = |name, flags: VmFlags| assert_eq!(value("flags", name), flags.to_word());
        flag("protected", VmFlags { protected: true, ..VmFlags::default() });
        flag("unshare_immediate", VmFlags { unshare_immediate: true, ..VmFlags::default() });
        flag("mmio_unguarded", VmFlags { mmio_unguarded: true, ..VmFlags::default() });
    }
}
