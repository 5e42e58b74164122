//! Taps that clients have handed over: descriptors that came beside a request (`SCM_RIGHTS`).
//!
//! They are kept for as long as the VM's definition has the network that they are of, so that it can be booted with them, and
//! booted again. What a machine gets are duplicates. When the network goes, so do they: then the client's tap may go.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::owner::State;
use crate::config::VmConfig;

/// By the network's id, one descriptor for each pair of queues.
#[derive(Debug, Default)]
pub(super) struct HandedTaps(HashMap<String, Vec<OwnedFd>>);

impl HandedTaps {
    /// Keeps what a network of the VM's has.
    pub(super) fn keep(&mut self, id: &str, tap: Vec<OwnedFd>) {
        if !tap.is_empty() {
            self.0.insert(id.to_owned(), tap);
        }
    }

    /// Duplicates for a machine; none where nothing was handed over.
    pub(super) fn of(&self, id: &str) -> io::Result<Vec<OwnedFd>> {
        let kept = self.0.get(id).map(Vec::as_slice).unwrap_or_default();
        duplicates(kept)
    }

    /// Lets go of those whose networks the VM has no more.
    pub(super) fn follow(&mut self, state: &State) {
        match state {
            State::NoVm => self.0.clear(),
            State::Created(config) => self.only(config),
            State::Up(vm) => self.only(vm.config()),
        }
    }

    fn only(&mut self, config: &VmConfig) {
        let has = |id: &String| config.net.iter().any(|net| net.id.as_ref() == Some(id));
        self.0.retain(|id, _| has(id));
    }
}

/// As many descriptors of the same files.
pub(super) fn duplicates(descriptors: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    descriptors.iter().map(OwnedFd::try_clone).collect()
}

/// For the configuration, which tells a tap that was handed over from others by its having numbers.
pub(super) fn numbers(descriptors: &[OwnedFd]) -> Vec<RawFd> {
    descriptors.iter().map(AsRawFd::as_raw_fd).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::config::NetConfig;

    #[test]
    fn a_tap_is_held_until_its_network_goes() {
        let (mut read, write) = io::pipe().unwrap();
        let mut taps = HandedTaps::default();
        taps.keep("n0", vec![write.into()]);
        taps.keep("n1", Vec::new());
        // A machine has it, and the next one has it, too.
        for round in [1, 2] {
            let mut machines = taps.of("n0").unwrap();
            let mut file = std::fs::File::from(machines.pop().unwrap());
            assert!(machines.is_empty());
            file.write_all(&[round]).unwrap();
        }
        assert!(taps.of("n1").unwrap().is_empty() && taps.of("n2").unwrap().is_empty());
        let net = |id: &str| NetConfig {
            id: Some(id.to_owned()),
            ..NetConfig::default()
        };
        let mut config = VmConfig {
            net: vec![net("n0"), net("n2")],
            ..VmConfig::default()
        };
        taps.follow(&State::Created(Box::new(config.clone())));
        assert_eq!(taps.of("n0").unwrap().len(), 1);
        assert!(config.remove_device("n0"));
        taps.follow(&State::Created(Box::new(config)));
        // Nobody has the other end any more.
        let mut all = Vec::new();
        read.read_to_end(&mut all).unwrap();
        assert_eq!(all, [1, 2]);
    }
}
