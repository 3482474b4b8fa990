//! Answers of `KVM_CHECK_EXTENSION`.

use super::slots::SLOTS;
use super::vm::{IPA_BITS, MAX_VCPUS};
use crate::gmem::GmemFlags;

const USER_MEMORY: u64 = 3;
const NR_VCPUS: u64 = 9;
const NR_MEMSLOTS: u64 = 10;
const MAX_VCPUS_CAPABILITY: u64 = 66;
const ONE_REG: u64 = 70;
const ARM_PSCI: u64 = 87;
const ARM_PSCI_0_2: u64 = 102;
const MAX_VCPU_ID: u64 = 128;
const IMMEDIATE_EXIT: u64 = 136;
const ARM_VM_IPA_SIZE: u64 = 165;
const USER_MEMORY2: u64 = 231;
const GUEST_MEMFD: u64 = 234;
const GUEST_MEMFD_FLAGS: u64 = 244;

/// The value of a capability; 0 for what there is not.
pub fn check(capability: u64) -> u64 {
    match capability {
        USER_MEMORY | ONE_REG | ARM_PSCI | ARM_PSCI_0_2 | IMMEDIATE_EXIT | USER_MEMORY2 | GUEST_MEMFD => 1,
        NR_VCPUS => 1,
        NR_MEMSLOTS => SLOTS.into(),
        MAX_VCPUS_CAPABILITY | MAX_VCPU_ID => MAX_VCPUS,
        ARM_VM_IPA_SIZE => IPA_BITS.into(),
        GUEST_MEMFD_FLAGS => GmemFlags::all().bits(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_exist_is_zero() {
        for absent in [233, 235, 203, 240, 9999, u64::MAX] {
            assert_eq!(check(absent), 0);
        }
        assert_eq!(check(GUEST_MEMFD_FLAGS), 3);
    }
}
