//! Memory of the host's pools, by name.
//!
//! What pools there are is configuration ([`HostConfig`]), how a range is had of one is `backends/dax`'s; here the two meet.

#![forbid(unsafe_code)]

use daxhund_dax::{Host, Pool, PoolError, RangeLock, Wanted};
use thiserror::Error;

use crate::config::{HostConfig, PoolConfig, UnknownPool, Zero};

/// Nothing was had of a pool.
#[derive(Debug, Error)]
pub enum TakeError {
    /// There is no such pool.
    #[error(transparent)]
    Unknown(#[from] UnknownPool),
    /// It does not have it.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// A range of a pool.
#[derive(Debug)]
pub struct FromPool {
    /// Nobody else can take it while this lives.
    pub lock: RangeLock,
    /// When the pool's memory is zeroed that becomes RAM.
    pub zero: Zero,
}

/// A pool as it is configured.
pub fn pool(name: &str, config: &PoolConfig) -> Pool {
    Pool::new(name, config.devices.clone())
}

/// Takes the first range of the pool `name` that is as wanted.
pub fn take(
    host: &Host,
    pools: &HostConfig,
    name: &str,
    wanted: Wanted,
) -> Result<FromPool, TakeError> {
    let config = pools.pool(name)?;
    let lock = pool(name, config).take(host, wanted)?;
    Ok(FromPool {
        lock,
        zero: config.zero,
    })
}
